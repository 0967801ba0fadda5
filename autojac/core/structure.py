"""What couples with what across the batch, and how it is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from autojac.core.pattern import Pattern, Sparsity
from autojac.errors import OptionError, require_choice

Coupling = Literal["independent", "grouped", "sparse", "statistics", "dense"]
Branches = Literal["", "perhaps", "by values"]
Assurance = Literal["proved", "observed", "declared"]

UPDATES_BUFFERS = "updates buffers"
KEEPS = "keeps values in attributes or containers"
SETS_ARGUMENTS = "sets something in its arguments"
DRAWS = "draws random numbers"
EXCHANGES = "assigns to .data"
DRAWS_ALIKE = "draws the same random numbers for every sample"
"""What a call may do besides returning a value.

One more plain call leaves what func keeps, or sets in its arguments, as func would; drawing alike is what the user
asked for, and restricts no method.
"""


@dataclass(frozen=True)
class Structure:
    """The dependence of a function's outputs on its inputs across the batch.

    Attributes:
        coupling: `independent` if output b depends on input b alone; `grouped` if it depends on the samples of its own
            group, `sparse` if on some others; `statistics` if, given some tensors that all samples share, such as a
            batch's mean and variance, it depends on b alone; else `dense`.
        assurance: `proved` for all inputs, `observed` on samples, or `declared` by the user.
        sliceable: whether calling the function on some of the samples gives those samples' outputs;
            false where the output depends on the batch size or on side inputs of other samples.
        suspect: the layers of the probe disagree, so every call is checked, unless nothing is assumed.
        effects: what a call does besides returning a value (`updates buffers`, `draws random numbers`), so that
            func must run once, or on the whole batch.
        kernels: operators that func runs, or may run, and that lack some derivatives which their plain formula has.
        evidence: one line for each layer of the probe, human-readable.
        sparsity: which samples and which coordinates of a sample can depend on each other; None if all may that the
            coupling allows.
        depends_on_arguments: the verdict was reached with certain contents of what is not differentiated, such as
            masks, segment ids and adjacency matrices, and nothing proves it for others.
        branches: whether Python sees data, so that func may take another branch at other values, and do there what no
            evaluation has shown: `by values`, as `if x.sum() > 0` does; `perhaps`, by shapes as of `x[x > 0]`, or
            where func can't be watched; empty if it can't.
    """

    coupling: Coupling
    assurance: Assurance = "observed"
    sliceable: bool = True
    suspect: bool = False
    effects: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    sparsity: Sparsity | None = None
    depends_on_arguments: bool = False
    branches: Branches = ""

    def __post_init__(self) -> None:
        require_choice("coupling", self.coupling, get_args(Coupling))
        require_choice("assurance", self.assurance, get_args(Assurance))
        require_choice("branches", self.branches, get_args(Branches))

    def __repr__(self) -> str:
        # the evidence is for `print`
        parts = [f"{self.coupling!r}", f"{self.assurance!r}"]
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if field.name != "evidence" and value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"Structure({', '.join(parts)})"

    def __str__(self) -> str:
        return "\n".join([f"{self.coupling}, {self.assurance}", *(f"  {line}" for line in self.evidence)])

    @property
    def independent(self) -> bool:
        return self.coupling == "independent"

    def fits(self, batch: int, rows: int, columns: int) -> bool:
        """Check whether its patterns are those of a batch of samples with as many outputs and inputs."""
        features = self.sparsity.features if self.sparsity else None
        samples = self.samples
        return (samples is None or samples.shape == (batch, batch)) and (
            features is None or features.shape == (rows, columns)
        )

    @property
    def assumes(self) -> bool:
        """Whether some entries are taken for zero, so that a method may be wrong where that does not hold."""
        return self.independent or self.sparsity is not None

    @property
    def needs_every_check(self) -> bool:
        """Whether the layers of the probe disagree about what is assumed; a dense Jacobian assumes nothing."""
        return self.suspect and (self.coupling != "dense" or self.sparsity is not None)

    @property
    def samples(self) -> Pattern | None:
        """The sample graph, where samples are coupled along one."""
        return self.sparsity.samples if self.coupling in ("grouped", "sparse") and self.sparsity else None

    @property
    def draws(self) -> bool:
        """Whether func draws random numbers."""
        return DRAWS in self.effects or DRAWS_ALIKE in self.effects

    def refute(self, reason: str) -> Structure:
        """Return the structure that remains after a check failed: dense, with the reason added."""
        return replace(
            self,
            coupling="dense",
            assurance="observed",
            sliceable=False,
            suspect=False,
            sparsity=None,
            depends_on_arguments=False,
            evidence=(*self.evidence, reason),
        )

    def without_patterns(self, reason: str) -> Structure:
        """Return the structure without its patterns, with the reason added."""
        coupling: Coupling = "dense" if self.coupling in ("grouped", "sparse") else self.coupling
        evidence = (*self.evidence, reason)
        return replace(self, coupling=coupling, sparsity=None, depends_on_arguments=False, evidence=evidence)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; patterns by their keys."""
        values = {name: value for name, value in vars(self).items() if name != "sparsity"}
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return data if self.sparsity is None else {**data, "sparsity": self.sparsity.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any], patterns: Callable[[str], Pattern] | None = None) -> Structure:
        """Return the structure that gave this JSON.

        Args:
            data: plain JSON types.
            patterns: gives the pattern of a key.

        Raises:
            OptionError: it names patterns and there is nothing to give them, or names them wrongly.
        """
        fields = {**data, **{name: tuple(data.get(name, ())) for name in ("effects", "kernels", "evidence")}}
        if "watched" in fields:  # as plans of autojac 0.1 call it
            fields["depends_on_arguments"] = fields.pop("watched")
        fields.setdefault("branches", "perhaps")  # which plans of autojac 0.1 don't tell
        named = fields.pop("sparsity", None)
        if named is None:
            return cls(**fields)
        if patterns is None:
            raise OptionError(
                "the structure's JSON names patterns by their keys, but no patterns were passed. Read it from the "
                "store that holds them, or pass patterns="
            )
        if not isinstance(named, dict) or not named.keys() <= {"samples", "features"}:
            raise OptionError(
                f"`sparsity` must name patterns by the keys 'samples' and 'features', got {named!r}. Pass "
                "what to_json() gave"
            )
        return cls(**fields, sparsity=Sparsity.from_parts({name: patterns(key) for name, key in named.items()}))
