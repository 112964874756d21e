"""Random histories of services that claim, freeze, die and come back, of clocks that jump and machines that
restart: what must hold after each step is checked after each step.
"""

import contextlib
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.quantizer.jobs.clock import Clock
from services.quantizer.jobs.database import Database
from services.quantizer.jobs.job import LeaseLost, NewJob, State

OWNERS = ("a", "b", "c")
LEASE_S = 20.0
LIVE = (State.RUNNING, State.PUBLISHING)


class SetClock(Clock):
    """Does what the history says."""

    def __init__(self):
        self.boot, self.time, self.wall = "boot-0", 100.0, 10**12

    def now(self):
        return self.time

    def wall_ms(self):
        return self.wall


class Histories(RuleBasedStateMachine):
    """`leases` holds every lease that was ever given, and who it was given to."""

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.clock = SetClock()
        self.database = Database(Path(self.directory.name) / "jobs.sqlite", self.clock)
        # What is lost when the power goes is another test's matter.
        self.database._connection.execute("PRAGMA synchronous = OFF")
        self.leases, self.ended, self.count, self.tokens = [], {}, 0, []
        self.alive_until = {}

    def teardown(self):
        self.database.close()
        self.directory.cleanup()

    @rule(name=st.sampled_from(("m", "n")), device=st.sampled_from(("", "cuda", "cuda:1")))
    def create(self, name, device):
        self.count += 1
        key = str(self.count)
        self.database.create(NewJob(f"job-{key}", "", key, "", name, "{}", device), 1000, 1000)

    @rule(owner=st.sampled_from(OWNERS))
    def heartbeat(self, owner):
        self.database.heartbeat(owner, LEASE_S)
        self.alive_until[owner] = (self.clock.boot, self.clock.time + LEASE_S)

    @rule(
        owner=st.sampled_from(OWNERS),
        device=st.sampled_from(("cuda:0", "cuda:1")),
        fence=st.integers(0, 50),
    )
    def claim(self, owner, device, fence):
        self.heartbeat(owner)
        claimed = self.database.claim(owner, device, lambda _name: fence)
        if claimed is not None:
            job, lease = claimed
            assert lease.token > max([fence, *self.tokens])
            assert job.state is State.RUNNING
            self.tokens.append(lease.token)
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), what=st.sampled_from(("progress", "publish", "end", "fail", "requeue", "log")))
    def act(self, data, what):
        lease = data.draw(st.sampled_from(self.leases))
        held = self.database.held(lease.owner).get(lease.job_id)
        is_valid = held is not None and held[0] == lease.token
        before = self.database.get(lease.job_id)
        try:
            if what in ("progress", "publish"):
                self.database.progress(lease, what, 1, 2, 1.0, is_publishing=what == "publish")
            elif what in ("end", "fail"):
                self.database.end(lease, State.SUCCEEDED if what == "end" else State.FAILED, what)
            elif what == "requeue":
                self.database.requeue(lease, what, 5.0, is_crash=True)
            else:
                self.database.save_log(lease, [what])
        except LeaseLost:
            assert not is_valid
            assert self.database.get(lease.job_id) == before
        else:
            assert is_valid

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def cancel(self, data):
        self.database.cancel(f"job-{data.draw(st.integers(1, self.count))}")

    @rule(owner=st.sampled_from(OWNERS), dead=st.sets(st.sampled_from(OWNERS)))
    def take_over(self, owner, dead):
        self.heartbeat(owner)
        before = {other: self.database.held(other) for other in OWNERS}
        taken = set(self.database.take_over(owner, dead))
        for other, jobs in before.items():
            boot, until = self.alive_until.get(other, ("", 0.0))
            is_gone = other in dead or boot != self.clock.boot or until < self.clock.time
            expected = set(jobs) if is_gone and other != owner else set()
            assert taken & set(jobs) == expected

    @rule(seconds=st.sampled_from((1.0, 6.0, 30.0)))
    def wait(self, seconds):
        self.clock.time += seconds

    @rule(jump=st.integers(-(10**12), 10**12))
    def set_the_wall_clock(self, jump):
        self.clock.wall = max(self.clock.wall + jump, 0)

    @rule()
    def restart_the_machine(self):
        self.clock.boot, self.clock.time = f"boot-{self.clock.boot}", 1.0

    @invariant()
    def one_run_of_a_name(self):
        jobs = self.database.page(None, 1000)
        live = [job.name for job in jobs if job.state in LIVE]
        assert len(live) == len(set(live))
        held = [job_id for owner in OWNERS for job_id in self.database.held(owner)]
        assert sorted(held) == sorted(job.job_id for job in jobs if job.state in LIVE)

    @invariant()
    def what_has_ended_stays_as_it_is(self):
        for job in self.database.page(None, 1000):
            with contextlib.suppress(KeyError):
                assert job == self.ended[job.job_id]
            if job.state.has_ended:
                self.ended[job.job_id] = job
                assert job.ended_ms is not None
                assert job.eta_s is None


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
