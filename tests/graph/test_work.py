"""What one evaluation costs, counted from its graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autojac.graph.work import SLOW, Kind, Work
from harness import planned


def work_of(func: object, x: Tensor) -> Work:
    return planned(func, (x,))[2].work


def test_products_count_two_flops_for_each_term_and_parameters_are_no_traffic() -> None:
    net = nn.Linear(3, 5).requires_grad_(False)
    work = work_of(net, torch.randn(8, 3))
    assert work.flops == 2 * 8 * 3 * 5
    assert sum(work.moved.values()) == 4 * (8 * 3 + 8 * 5)
    assert work.operators == 2  # the transposed weight, and the product


def test_a_map_moves_what_it_reads_and_what_it_makes() -> None:
    work = work_of(lambda x: x.sin() * x, torch.randn(16, 4, dtype=torch.float64))
    size = 8 * 16 * 4
    assert work.operators == 2
    assert work.flops == 0
    assert work.moved == {round(math.log2(2 * size)): 2 * size, round(math.log2(3 * size)): 3 * size}


def test_a_convolution_counts_its_window() -> None:
    net = nn.Conv1d(2, 3, 5, padding=2).requires_grad_(False)
    work = work_of(net, torch.randn(4, 2, 10))
    assert work.flops == SLOW[Kind.CONVOLUTION] * 2 * (4 * 3 * 10) * (2 * 5)


def test_work_follows_the_batch() -> None:
    problem = planned(lambda x: x.sin(), (torch.randn(1024, 3),))[2]
    whole, part = problem.work, problem.resize(256).work
    assert sum(whole.moved.values()) == 4 * sum(part.moved.values())
    assert [size - 2 for size in whole.moved] == list(part.moved)
    assert whole.operators == part.operators


def test_what_has_no_graph_is_taken_for_some_operators_on_what_a_seed_moves() -> None:
    problem = planned(lambda x: x * float(x.detach().sum()), (torch.randn(8, 3),), coupling="independent")[2]
    unknown = type(problem)(**{**problem.__dict__, "analysis": None}).work
    assert unknown.operators > 1
    assert sum(unknown.moved.values()) == problem.seed_bytes
