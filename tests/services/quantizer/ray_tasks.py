"""What the Ray tests have workers do; the workers find it by name."""

import dataclasses
import os
import time
from pathlib import Path

import torch

from services.quantizer.errors import QuantizerError


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    rows: torch.Tensor
    gram: torch.Tensor
    number: int


def multiply(task):
    return {"out": task.rows @ task.gram, "number": task.number, "process": os.getpid()}


def refuse(number):
    if number == 2:
        time.sleep(0.3)
        raise QuantizerError("tensor two: no")
    if number == 3:
        raise ValueError("three")
    return number


def write(task):
    task.gram[0] = 0.0
    return 0


class TwoWords(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def refuse_oddly(_):
    raise TwoWords("not", "copied")


def die_once(task):
    number, marker = task
    if number == 3 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), 9)
    return number * number


def die(_):
    os.kill(os.getpid(), 9)
