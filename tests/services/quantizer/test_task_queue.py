"""Tasks in flight: order, the limit, and what was lost."""

import math

from hypothesis import given
from hypothesis import strategies as st

from services.quantizer.task_queue import TaskQueue


def queue_of(num_tasks, limit=math.inf):
    return TaskQueue(iter(range(num_tasks)), lambda task: [task], limit)


def test_a_task_that_was_lost_goes_before_new_ones():
    queue = queue_of(3)
    first, second = queue.next_job(), queue.next_job()
    queue.lose(second)
    queue.lose(first)
    assert [queue.next_job(), queue.next_job()] == [first, second]
    assert (first.num_losses, second.num_losses) == (1, 1)
    assert queue.next_job().index == 2
    assert queue.next_job() is None


def test_no_task_is_taken_beyond_the_limit_until_an_answer_is():
    taken = []
    queue = TaskQueue((taken.append(i) or i for i in range(9)), lambda task: [task], 2)
    jobs = [queue.next_job(), queue.next_job()]
    assert queue.next_job() is None
    queue.answer(jobs[1], "b")  # done, but not yet due
    assert not queue.has_answer
    assert queue.next_job() is None
    queue.answer(jobs[0], "a")
    assert [queue.take_answer(), queue.take_answer()] == ["a", "b"]
    assert taken == [0, 1]
    assert queue.next_job().index == 2


def test_no_tasks_are_done_at_once():
    queue = queue_of(0)
    assert queue.next_job() is None
    assert queue.is_done


@given(st.integers(0, 8), st.sampled_from([1, 2, 3, math.inf]), st.randoms(use_true_random=False))
def test_answers_come_in_the_order_of_the_tasks(num_tasks, limit, random):
    queue, running, answers, num_lost = queue_of(num_tasks, limit), [], [], 0
    while not queue.is_done:
        step = random.choice(["hand out", "hand out", "answer", "lose"])
        if step == "hand out" and (job := queue.next_job()) is not None:
            assert job.arguments == [job.index]
            running.append(job)
            assert len(running) <= limit
        elif running and (step == "answer" or num_lost > 20):
            job = running.pop(random.randrange(len(running)))
            queue.answer(job, job.index * 10)
        elif running and step == "lose":
            queue.lose(running.pop(random.randrange(len(running))))
            num_lost += 1
        while queue.has_answer:
            answers.append(queue.take_answer())
    assert answers == [10 * index for index in range(num_tasks)]
