"""Several processes that make one image: a pool of them, and what they run."""

import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

MOST = 4


class Pool:
    """Processes forked from this one, which has imported all they need, in groups of one to four.

    All groups but the one of four leave out the first process, so that a rank within the group is none of all.
    """

    def __init__(self):
        fork, self.store = multiprocessing.get_context("fork"), os.path.join(tempfile.mkdtemp(), "store")
        self.ends, self.processes = [], []
        for rank in range(MOST):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=serve, args=(rank, theirs, self.store), daemon=True)
            process.start()
            self.ends.append(ours)
            self.processes.append(process)

    def start(self, count, work, *given):
        """``work(group, *given)`` in `count` processes; the result waits for what that gives, by rank."""
        task = pickle.dumps((count, work, given))
        ends = self.ends[-count:] if count < MOST else self.ends
        for end in ends:
            end.send_bytes(task)

        def results():
            found = [pickle.loads(end.recv_bytes()) for end in ends]
            for each in found:
                if isinstance(each, Failed):
                    raise AssertionError(each.told)
            return found

        return results

    def run(self, count, work, *given):
        return self.start(count, work, *given)()

    def close(self):
        for end in self.ends:
            end.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(timeout=20)
        shutil.rmtree(os.path.dirname(self.store))
        return [process.exitcode for process in self.processes]


class Failed:
    def __init__(self, told):
        self.told = told


def serve(rank, end, store):
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    limit = timedelta(seconds=60)  # so that a test that fails in one of them does not hang
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=MOST, timeout=limit)
    groups = {count: dist.new_group(range(MOST - count, MOST), timeout=limit) for count in range(1, MOST)}
    groups[MOST] = dist.group.WORLD
    while (task := pickle.loads(end.recv_bytes())) is not None:
        count, work, given = task
        try:
            result = work(groups[count], *given)
        except BaseException:
            result = Failed(traceback.format_exc())
        end.send_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def alone(work, count, seconds, *given):
    """``work(rank, group, *given)`` in processes of their own, which may die, with a group of so short a time-out."""
    fork, store = multiprocessing.get_context("fork"), os.path.join(tempfile.mkdtemp(), "store")
    ends, processes = [], []

    def run(rank, end):
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        limit = timedelta(seconds=seconds)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit)
        end.send(work(rank, dist.group.WORLD, *given))
        time.sleep(60)  # what has failed may live on

    for rank in range(count):
        ours, theirs = fork.Pipe()
        processes.append(fork.Process(target=run, args=(rank, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        ends.append(ours)
    found = []
    for end in ends:
        try:
            found.append(end.recv() if end.poll(60) else "hangs")
        except EOFError:
            found.append("died")
    for process in processes:
        process.kill()
        process.join()
    shutil.rmtree(os.path.dirname(store))
    return found
