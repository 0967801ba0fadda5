"""`autojac demo`: a network trained with Jacobians that were probed, tuned, verified and remembered.

A camera sees 24 markers on a robot arm, with noise. A network learns where they are from the angles of the four joints,
and must learn the Jacobian too, since that is what a controller of the arm needs: Sobolev training (Czarnecki et al.,
2017). Four inputs and 48 outputs: forward mode has four passes to make, torch's default 48.
"""

from __future__ import annotations

import time

import click
import torch
from torch import Tensor, nn

import autojac
from autojac.core.plan import EFFORTS, Effort, Plan
from autojac.methods.threads import threads
from autojac.planning.explain import format_seconds

LINKS = (0.4, 0.3, 0.2, 0.1)
"""Lengths in metres, from the shoulder outwards."""
MARKERS = 6
"""On each link, evenly."""
NOISE = 0.02
"""Standard deviation of a measured coordinate, in metres."""
BUDGET_S = 15.0
"""Seldom needed in full: on a machine that is busy, enough to reach torch's default."""


class Arm:
    """A planar arm, exactly: where its markers are, and the derivative of that by the joint angles."""

    def __init__(self) -> None:
        joints = len(LINKS)
        weights = torch.tensor(LINKS).repeat(joints * MARKERS, 1)  # of each link's direction in each marker's place
        for row in range(joints * MARKERS):
            link, step = divmod(row, MARKERS)
            weights[row, link] *= (step + 1) / MARKERS
            weights[row, link + 1 :] = 0
        self.weights = weights
        self.below = torch.ones(joints, joints).tril()  # a link turns with every joint up to its own

    def places(self, angles: Tensor) -> Tensor:
        """Map angles (B, 4) in radians to places (B, 24, 2) in metres."""
        turned = angles @ self.below.T
        return self.weights @ torch.stack([turned.cos(), turned.sin()], dim=-1)

    def jacobian(self, angles: Tensor) -> Tensor:
        """Map angles (B, 4) to the derivatives (B, 24, 2, 4) of the places."""
        turned = angles @ self.below.T
        across = torch.stack([-turned.sin(), turned.cos()], dim=-1)
        return torch.einsum("ml,blc,lj->bmcj", self.weights, across, self.below)


class MarkerNetwork(nn.Module):
    """What the camera's measurements are to teach: angles (B, 4) to places (B, 24, 2)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        outputs = 2 * MARKERS * len(LINKS)
        self.layers = nn.Sequential(
            nn.Linear(len(LINKS), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
        )

    def forward(self, angles: Tensor) -> Tensor:
        return self.layers(angles).unflatten(-1, (-1, 2))  # type: ignore[no-any-return]


@click.command()
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True, help="Steps of training.")
@click.option("--poses", type=click.IntRange(2), default=512, show_default=True, help="Poses measured.")
@click.option("--effort", type=click.Choice(EFFORTS), default="quick", show_default=True, help="How hard to search.")
def demo(steps: int, poses: int, effort: Effort) -> None:
    """Train a network with tuned, verified, remembered Jacobians.

    It takes less than a minute. The second run finds in the store what the first one kept; AUTOJAC_STORE says where
    that is.

    \b
    Examples:
      autojac demo
      autojac demo --steps 1000 --effort measure
    """
    with threads(1):
        torch.manual_seed(0)
        _tell(steps, poses, effort)


def _tell(steps: int, poses: int, effort: Effort) -> None:
    arm, model = Arm(), MarkerNetwork()
    angles = draw_poses(poses)
    places = arm.places(angles)
    measured = places + NOISE * torch.randn_like(places)
    store = autojac.PlanStore()
    jac = autojac.AutoJacobian(model, on_miss="tune", effort=effort, budget_s=BUDGET_S, store=store)
    click.echo(f"A network learns a robot arm from {poses} poses, markers measured with {NOISE * 100:g} cm of noise:")
    click.echo(f"{len(LINKS)} joint angles to {len(LINKS) * MARKERS} places, and the Jacobian that control needs.\n")

    start = time.perf_counter()
    plan = jac.plan(angles)
    _show_plan(plan, time.perf_counter() - start, store.description)

    click.echo(f"\nTraining on places and Jacobians, J of shape {tuple(jac(angles).shape)}:")
    start = time.perf_counter()
    train(model, angles, measured, steps, jac, arm.jacobian(angles))
    click.echo(f"  {steps} steps in {format_seconds(time.perf_counter() - start)}")

    plain = MarkerNetwork()
    train(plain, angles, measured, steps)
    unseen = draw_poses(poses)
    J = jac(unseen).detach()
    autojac.verify(J, model, unseen)
    ignorant = autojac.AutoJacobian(plain, on_miss="tune", effort=effort, budget_s=BUDGET_S, store=store)(
        unseen
    ).detach()
    click.echo(f"\nOn {poses} other poses:")
    click.echo("  verified: J agrees with the network's own vector-Jacobian products")
    click.echo(f"  error against the arm's true Jacobian: {_error(J, arm.jacobian(unseen)):.1%}")
    click.echo(f"  the same network trained on places alone: {_error(ignorant, arm.jacobian(unseen)):.1%}")
    click.echo(f"\n{_farewell(plan, store.description)}")


def train(
    model: nn.Module,
    angles: Tensor,
    measured: Tensor,
    steps: int,
    jac: autojac.AutoJacobian | None = None,
    exact: Tensor | None = None,
) -> None:
    """Fit measured places and, with `jac`, the exact Jacobian (B, 24, 2, 4); the losses are told now and then."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=steps + 1)
    for step in range(1, steps + 1):
        if jac is None:
            loss = (model(angles) - measured).square().mean()
        else:
            places, J = jac.value_and_jacobian(angles)
            misfit, slopes = (places - measured).square().mean(), (J - exact).square().mean()
            loss = misfit + slopes
            if step in (1, steps) or step % max(steps // 4, 1) == 0:
                click.echo(f"  step {step:4}: loss {loss.item():.2e} (places {misfit:.2e}, Jacobian {slopes:.2e})")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def draw_poses(count: int) -> Tensor:
    """Draw joint angles (count, 4) within a quarter turn to either side."""
    return (torch.rand(count, len(LINKS)) - 0.5) * torch.pi


def _show_plan(plan: Plan, took: float, place: str) -> None:
    from autojac.cli.plans import show, trials_table
    from autojac.cli.tune import pace, trial_count

    structure = plan.structure
    how = "Remembered from an earlier probe" if plan.source == "store" else "Probed"
    click.echo(f"{how}: samples are {structure.coupling} ({structure.assurance})")
    for line in structure.evidence:
        click.echo(f"  {line}")
    if plan.trials:
        click.echo(f"\nTuned: {trial_count(plan)} candidates, each checked, then timed with the backward through J")
        show(trials_table(plan.trials))
    click.echo(f"\nPlan: {plan}")
    click.echo(f"  {pace(plan)}")
    if plan.source == "store":
        click.echo(
            f"  source: store, found in {format_seconds(took)} in {place}; {trial_count(plan)} trials in this run"
        )
    else:
        click.echo(f"  source: {plan.source}, {trial_count(plan)} trials in {format_seconds(took)}")


def _error(J: Tensor, exact: Tensor) -> float:
    return float((J - exact).norm() / exact.norm())


def _farewell(plan: Plan, place: str) -> str:
    if place.startswith("memory"):
        return "The plan was not kept: set AUTOJAC_STORE to a path that can be written."
    if plan.source == "store":
        return "`autojac plans list` shows what is remembered; `autojac plans rm --all` forgets it."
    return f"The plan is kept in {place}:\nrun the same again, and it is found there without a probe or a trial."
