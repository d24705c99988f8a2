"""What both sides of training_peers.py train with, and how a contender is played. Knows torch only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

NUM_ENVS, HORIZON = 64, 128  # 8,192 transitions per rollout
# Of contenders that encode every window anew: what a transition costs them does not depend on it, and an iteration
# would take a minute.
SHORT_HORIZON = 32
CONTEXT = 64  # bars that a decision looks back on; ours sees 64 to 191
FEATURES, FEW_FEATURES = 24, 7  # of a bar: ours, and what an example of gym-trading-env has
POSITIONS = (-1.0, 0.0, 1.0)
FEE = 6e-4
WIDTH, LAYERS, HEADS = 64, 2, 4  # of the transformer; the MLP has as many units in each of its layers
PASSES, MINIBATCH = 4, 2_048  # over each rollout; transitions per optimizer step
GAMMA, LAMBDA, CLIP, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5
LEARNING_RATE, MAX_GRAD_NORM = 3e-4, 0.5


@dataclass
class Contender:
    """What is played, and what the report tells of it."""

    iterate: Callable[[], tuple[float, float]]  # a rollout and its update: seconds of each
    transitions: int  # of an iteration
    parameters: int
    flops_per_transition: float = 0.0


def serve(contenders: Mapping[str, Callable[[], Contender]]) -> None:
    """Play one contender: arguments are its name and threads; a line on stdin is the least seconds of a round.

    The first line out tells what is known of the contender; then one line per round: transitions, seconds, CPU
    seconds, and seconds of rollouts.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what others print goes elsewhere
    name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    one = contenders[name]()
    one.iterate()  # allocations, and what is done lazily
    facts = {"parameters": one.parameters, "flops_per_transition": one.flops_per_transition}
    answers.write(json.dumps({"torch": torch.__version__, **facts}) + "\n")
    for line in sys.stdin:
        iterations, in_rollouts, cpu, start = 0, 0.0, time.process_time(), time.perf_counter()
        while not iterations or time.perf_counter() - start < float(line):
            in_rollouts += one.iterate()[0]
            iterations += 1
        told = {
            "transitions": iterations * one.transitions,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "rollout_seconds": in_rollouts,
        }
        answers.write(json.dumps(told) + "\n")
