"""The sentiment model in two processes at once, each with half of every batch, and in one with the whole.

torch's DistributedDataParallel averages the gradients of the processes before each step of the optimizer. With halves
of equal size that is the gradient of the joined batch, so all runs do the same steps: the losses agree, and so do
the gradients of one batch, weight by weight. The layers need no change for that; other machines are more processes.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import torch
from torch import Tensor, multiprocessing, nn

from benchmarks.tasks import lab
from benchmarks.tasks.layers import layer_class
from benchmarks.tasks.sentiment import Classifier, Sentiment

PROCESSES = 2
PATIENCE = timedelta(minutes=10)  # for the processes to find each other, and for any one answer


class Parallel(Sentiment):
    """``limit`` keeps only so many snippets. Runs: each layer in two processes, then the last one in this process."""

    epochs = 4
    clip = 1.0
    options: ClassVar = {}
    layers = ("torch", "fastcells", "one process")
    with_reference = False

    def __init__(self, seed: int = 0, cell: str | None = None, limit: int = 4000) -> None:
        super().__init__(seed, cell, limit=limit)
        self.arguments = {"seed": seed, "cell": cell, "limit": limit}  # from which another process makes the same

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        # Without dropout: two processes would draw other masks than one.
        return Classifier(layer, len(self.vocabulary) + 2, dropout=0.0)

    def training(self, seed: int) -> list[lab.Batch]:
        """Whole batches alone, so that all processes have equally much of each."""
        return [batch for batch in super().training(seed) if len(batch[1]) % PROCESSES == 0]

    def run(self, layer: str) -> lab.Run:
        if layer == "one process":
            run = super().run("fastcells")
            run.name = layer
            return run
        return Distributed(layer, self, super().run(layer).model)

    def remarks(self, runs: Sequence[lab.Run]) -> list[str]:
        lines = [f"{PROCESSES} processes of one thread each; one process: fastcells with the joined batches"]
        batch = self.training(0)[0]
        found = {run.name: gradients(run, batch) for run in runs}
        alone = found.pop("one process", {})
        for name, of_name in found.items() if alone else ():
            apart = difference(of_name, alone)
            lines.append(f"gradients of a batch, {name} in {PROCESSES} processes to one process: {apart:.0e} relative")
        return lines


class Distributed(lab.Run):
    """A run whose training happens in other processes; its own model gets their weights after each epoch."""

    def warm_up(self, batches: Sequence[lab.Batch]) -> None:
        """Start the processes, with this model's weights."""
        context = multiprocessing.get_context("spawn")
        self.meeting = tempfile.TemporaryDirectory()  # a file in it is where the processes find each other
        weights = {name: value.numpy() for name, value in self.model.state_dict().items()}
        job = Job(self.name, self.task.cell, weights, f"file://{self.meeting.name}/store")
        self.pipes, self.workers = [], []
        for rank in range(PROCESSES):
            here, there = context.Pipe()
            worker = context.Process(target=work, args=(rank, job, self.task.arguments, there), daemon=True)  # type: ignore[attr-defined]
            worker.start()
            there.close()
            self.pipes.append(here)
            self.workers.append(worker)
        self.ask("warm_up", batches)

    def train(self, batches: Sequence[lab.Batch], tick: Callable[[], None]) -> tuple[float, float]:
        answers = self.ask("train", batches)
        for _ in batches:
            tick()
        weights, self.norms = answers[0][2], answers[0][3]
        self.model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return sum(loss for loss, *_ in answers) / PROCESSES, max(seconds for _, seconds, *_ in answers)

    def ask(self, command: str, batches: Sequence[lab.Batch]) -> list[Any]:
        """What each process answers. Of every batch each gets every PROCESSES-th sequence."""
        for rank, pipe in enumerate(self.pipes):
            share = [[part[rank::PROCESSES].numpy() for part in (*inputs, targets)] for inputs, targets in batches]
            pipe.send((command, share))
        answers = []
        for pipe, worker in zip(self.pipes, self.workers, strict=True):
            waited = 0
            while not pipe.poll(1):
                waited += 1
                if not worker.is_alive() or waited > PATIENCE.seconds:
                    raise RuntimeError(f"parallel: no answer to {command!r}; exit status {worker.exitcode}")
            answer = pipe.recv()
            if isinstance(answer, str):
                raise RuntimeError(f"parallel: a process failed\n{answer}")
            answers.append(answer)
        return answers

    def close(self) -> None:
        """Takes no more training."""
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(None)
        for worker in self.workers:
            worker.join(10)
            worker.kill()
            worker.join()
        self.meeting.cleanup()


@dataclass(frozen=True)
class Job:
    """What the processes start from."""

    layer: str
    cell: str
    weights: dict[str, Any]
    meeting: str  # torch.distributed's init_method


def work(rank: int, job: Job, arguments: dict[str, Any], pipe: Connection) -> None:
    """One of the processes: an ordinary `lab.Run` around torch's DistributedDataParallel, told what to do by a pipe."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo", init_method=job.meeting, rank=rank, world_size=PROCESSES, timeout=PATIENCE
        )
        task = Parallel(**arguments)
        model = task.model(layer_class(job.layer, job.cell))
        model.load_state_dict({name: torch.from_numpy(value) for name, value in job.weights.items()})
        run = lab.Run(job.layer, task, DistributedDataParallel(model))
        while (asked := pipe.recv()) is not None:
            command, share = asked
            parts = [[torch.from_numpy(part) for part in batch] for batch in share]
            batches = [(tuple(inputs), targets) for *inputs, targets in parts]
            if command == "train":
                loss, seconds = run.train(batches, lambda: None)
                weights = {name: value.numpy() for name, value in model.state_dict().items()}
                pipe.send((loss, seconds, weights, run.norms))
            elif command == "gradients":
                pipe.send({name: value.numpy() for name, value in gradients(run, batches[0]).items()})
            else:
                run.warm_up(batches)
                pipe.send(True)
        distributed.destroy_process_group()
    except (Exception, KeyboardInterrupt):
        with suppress(OSError):
            pipe.send(traceback.format_exc())


def gradients(run: lab.Run, batch: lab.Batch) -> dict[str, Tensor]:
    """Of a batch, by weight; from the processes if the run has some."""
    if isinstance(run, Distributed):
        return {name: torch.from_numpy(value) for name, value in run.ask("gradients", [batch])[0].items()}
    run.model.train()
    run.model.zero_grad()
    run.task.loss(run.output(batch[0]), batch[1]).backward()
    found = {name.removeprefix("module."): weight.grad for name, weight in run.model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of all weights' gradients, the largest difference over the largest value."""
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max().clamp_min(1e-30)).item() for name in b)
