from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("weft_version", "services", "address", "process_id", "uptime_seconds", "is_serving", "is_stopping", "calls_begun", "calls_ended", "calls_by_code", "log_level", "dropped_log_records", "files")
    class CallsByCodeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WEFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    IS_STOPPING_FIELD_NUMBER: _ClassVar[int]
    CALLS_BEGUN_FIELD_NUMBER: _ClassVar[int]
    CALLS_ENDED_FIELD_NUMBER: _ClassVar[int]
    CALLS_BY_CODE_FIELD_NUMBER: _ClassVar[int]
    LOG_LEVEL_FIELD_NUMBER: _ClassVar[int]
    DROPPED_LOG_RECORDS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    weft_version: str
    services: _containers.RepeatedScalarFieldContainer[str]
    address: str
    process_id: int
    uptime_seconds: float
    is_serving: bool
    is_stopping: bool
    calls_begun: int
    calls_ended: int
    calls_by_code: _containers.ScalarMap[str, int]
    log_level: str
    dropped_log_records: int
    files: _containers.RepeatedCompositeFieldContainer[WatchedFile]
    def __init__(self, weft_version: _Optional[str] = ..., services: _Optional[_Iterable[str]] = ..., address: _Optional[str] = ..., process_id: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., is_serving: bool = ..., is_stopping: bool = ..., calls_begun: _Optional[int] = ..., calls_ended: _Optional[int] = ..., calls_by_code: _Optional[_Mapping[str, int]] = ..., log_level: _Optional[str] = ..., dropped_log_records: _Optional[int] = ..., files: _Optional[_Iterable[_Union[WatchedFile, _Mapping]]] = ...) -> None: ...

class WatchedFile(_message.Message):
    __slots__ = ("what", "reloads", "failures")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    RELOADS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    what: str
    reloads: int
    failures: int
    def __init__(self, what: _Optional[str] = ..., reloads: _Optional[int] = ..., failures: _Optional[int] = ...) -> None: ...

class SetLogLevelRequest(_message.Message):
    __slots__ = ("level",)
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    level: str
    def __init__(self, level: _Optional[str] = ...) -> None: ...

class SetLogLevelResponse(_message.Message):
    __slots__ = ("previous",)
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    previous: str
    def __init__(self, previous: _Optional[str] = ...) -> None: ...

class StartDrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StartDrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
