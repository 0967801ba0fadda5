"""Cases of schnetpack, torch-geometric and e3nn: energies and features of atoms and graphs."""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autojac.bench.interop.case import Built, case

ATOMS = 5


def complete_graph(samples: int, nodes: int = ATOMS) -> Tensor:
    """Return the edges (2, E) of so many graphs in which all nodes are neighbours."""
    one = torch.cartesian_prod(torch.arange(nodes), torch.arange(nodes))
    one = one[one[:, 0] != one[:, 1]].T
    return (one[:, None] + nodes * torch.arange(samples)[None, :, None]).flatten(1)


def owners(samples: int, nodes: int = ATOMS) -> Tensor:
    """Return to which graph each node belongs."""
    return torch.arange(samples).repeat_interleave(nodes)


def on_graphs(layer: Any, width: int = 4, samples: int = 8) -> Built:
    """Return a layer of graphs, summed over the nodes; (B, nodes, width) to (B, out)."""

    def func(x: Tensor) -> Tensor:
        hidden: Tensor = layer(x.flatten(0, 1), complete_graph(len(x)))
        return hidden.tanh().view(len(x), ATOMS, -1).sum(1)

    return Built(func, torch.randn(samples, ATOMS, width), layer)


@case("torch_geometric/gcn", trains=True)
def gcn() -> Built:
    from torch_geometric.nn import GCN

    return on_graphs(GCN(4, 16, num_layers=2, out_channels=6))


@case("torch_geometric/gat", trains=True)
def gat() -> Built:
    from torch_geometric.nn import GATConv

    return on_graphs(GATConv(4, 3, heads=2))


@case("torch_geometric/sage", trains=True)
def sage() -> Built:
    from torch_geometric.nn import GraphSAGE

    return on_graphs(GraphSAGE(4, 16, num_layers=2, out_channels=6))


@case("torch_geometric/gin", trains=True)
def gin() -> Built:
    from torch_geometric.nn import GIN

    return on_graphs(GIN(4, 16, num_layers=2, out_channels=6).eval())


@case("torch_geometric/edge-conv", trains=True)
def edge_conv() -> Built:
    from torch_geometric.nn import EdgeConv

    return on_graphs(EdgeConv(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6)), aggr="mean"))


def energies(model: Any, samples: int = 4) -> Built:
    """Return the energy of each molecule, differentiated in its positions."""

    def func(positions: Tensor) -> Tensor:
        kinds = torch.ones(ATOMS * len(positions), dtype=torch.long)
        out: Tensor = model(kinds, positions.flatten(0, 1), owners(len(positions)))
        return out

    return Built(func, torch.randn(samples, ATOMS, 3), model)


def neighbours(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return all edges and their lengths, as torch-geometric's models ask for them."""
    edges = complete_graph(len(positions) // ATOMS)
    return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)


@case("torch_geometric/schnet", trains=True)
def schnet() -> Built:
    from torch_geometric.nn.models import SchNet

    sizes = {"hidden_channels": 16, "num_filters": 16, "num_interactions": 2, "num_gaussians": 8}
    return energies(SchNet(**sizes, interaction_graph=neighbours))


def triplets(edges: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
    """Return all paths k → j → i of two edges, as torch-geometric's DimeNet asks for them."""
    j, i = edges
    ji, kj = ((i[None] == j[:, None]) & (j[None] != i[:, None])).nonzero().T
    return i, j, i[ji], j[ji], j[kj], kj, ji


@case("torch_geometric/dimenet", trains=True)
def dimenet() -> Built:
    from torch_geometric.nn.models import DimeNetPlusPlus
    from torch_geometric.nn.models import dimenet as module

    sizes = {"hidden_channels": 8, "out_channels": 1, "num_blocks": 1, "int_emb_size": 4, "basis_emb_size": 4}
    model = DimeNetPlusPlus(**sizes, out_emb_channels=8, num_spherical=2, num_radial=3)
    # what it takes of compiled packages, which have no wheel for every torch
    vars(module).update(triplets=triplets, radius_graph=lambda positions, **_: complete_graph(len(positions) // ATOMS))
    return energies(model, 2)


def schnetpack() -> Any:
    from torch.utils.data import dataloader

    # a name that it imports and that torch has dropped
    vars(dataloader).setdefault("T_co", TypeVar("T_co", covariant=True))
    return importlib.import_module("schnetpack")


@case("schnetpack/schnet-energy", trains=True)
def schnetpack_energy() -> Built:
    spk = schnetpack()
    radial = spk.nn.GaussianRBF(n_rbf=8, cutoff=5.0)
    representation = spk.representation.SchNet(16, 2, radial, spk.nn.CosineCutoff(5.0))
    head = spk.atomistic.Atomwise(n_in=16, output_key="energy")
    model = nn.ModuleList([representation, head])

    def func(positions: Tensor) -> Tensor:
        samples = len(positions)
        edges, flat = complete_graph(samples), positions.flatten(0, 1)
        inputs = {
            "_atomic_numbers": torch.ones(ATOMS * samples, dtype=torch.long),
            "_n_atoms": torch.full((samples,), ATOMS),
            "_idx_m": owners(samples),
            "_idx_i": edges[0],
            "_idx_j": edges[1],
            "_Rij": flat[edges[1]] - flat[edges[0]],
        }
        energy: Tensor = head(representation(inputs))["energy"]
        return energy

    return Built(func, torch.randn(4, ATOMS, 3), model)


@case("schnetpack/radial-basis")
def radial_basis() -> Built:
    spk = schnetpack()
    basis, cutoff = spk.nn.GaussianRBF(n_rbf=8, cutoff=5.0), spk.nn.CosineCutoff(5.0)
    return Built(lambda d: basis(d) * cutoff(d)[..., None], 1 + torch.rand(64, 2))


@case("e3nn/spherical-harmonics")
def spherical_harmonics() -> Built:
    from e3nn import o3

    return Built(lambda v: o3.spherical_harmonics([0, 1, 2], v, normalize=True), torch.randn(64, 3))


@case("e3nn/tensor-product", trains=True)
def tensor_product() -> Built:
    from e3nn import o3

    model = o3.FullyConnectedTensorProduct("4x0e + 2x1o", "1x0e + 1x1o", "3x0e + 1x1o")
    second = torch.randn(1, 4)
    return Built(lambda x: model(x, second.expand(len(x), 4)), torch.randn(16, 10), model)


@case("e3nn/gate", trains=True)
def gate() -> Built:
    from e3nn import nn as layers
    from e3nn import o3

    gated = layers.Gate("4x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o")
    model = nn.Sequential(o3.Linear("3x0e + 2x1o", gated.irreps_in), gated)
    return Built(model, torch.randn(16, 9), model)
