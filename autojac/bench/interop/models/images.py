"""Cases of kornia and pypose: rotations, projections, colours, warps, and poses."""

from __future__ import annotations

import torch
from torch import Tensor

from autojac.bench.interop.case import Built, case


@case("kornia/axis-angle-to-matrix")
def axis_angle() -> Built:
    from kornia.geometry.conversions import axis_angle_to_rotation_matrix

    return Built(lambda v: axis_angle_to_rotation_matrix(v).flatten(1), torch.randn(64, 3))


@case("kornia/quaternion-to-matrix")
def quaternion() -> Built:
    from kornia.geometry.conversions import quaternion_to_rotation_matrix

    return Built(lambda q: quaternion_to_rotation_matrix(q).flatten(1), torch.randn(64, 4))


@case("kornia/euler-from-quaternion")
def euler_angles() -> Built:
    from kornia.geometry.conversions import euler_from_quaternion

    def func(q: Tensor) -> Tensor:
        q = q / q.norm(dim=-1, keepdim=True)
        return torch.stack(euler_from_quaternion(*q.unbind(-1)), -1)

    return Built(func, torch.randn(64, 4) * 0.2 + torch.tensor([1.0, 0, 0, 0]))


@case("kornia/project-points")
def project() -> Built:
    from kornia.geometry.camera import project_points

    camera = torch.tensor([[30.0, 0, 16], [0, 30, 16], [0, 0, 1]])
    return Built(
        lambda p: project_points(p, camera.expand(len(p), 3, 3)), torch.randn(64, 3) * 0.3 + torch.tensor([0, 0, 4.0])
    )


@case("kornia/transform-points")
def transform() -> Built:
    from kornia.geometry.linalg import transform_points

    pose = torch.eye(4)[None] + 0.1 * torch.randn(1, 4, 4)
    return Built(lambda p: transform_points(pose.expand(len(p), 4, 4), p), torch.randn(32, 5, 3))


@case("kornia/so3-exp")
def so3() -> Built:
    from kornia.geometry.liegroup import So3

    return Built(lambda v: So3.exp(v).matrix().flatten(1), torch.randn(64, 3))


@case("kornia/distort-points")
def distort() -> Built:
    from kornia.geometry.calibration import distort_points

    camera = torch.tensor([[30.0, 0, 16], [0, 30, 16], [0, 0, 1]])
    lens = torch.tensor([0.1, -0.05, 0.01, 0.02])
    return Built(
        lambda p: distort_points(p, camera.expand(len(p), 3, 3), lens.expand(len(p), 4)), 10 + 10 * torch.rand(32, 4, 2)
    )


@case("kornia/rgb-to-lab")
def lab() -> Built:
    from kornia.color import rgb_to_lab

    return Built(lambda x: rgb_to_lab(x).mean((2,)), torch.rand(8, 3, 4, 4) * 0.8 + 0.1)


@case("kornia/rgb-to-hsv")
def hsv() -> Built:
    from kornia.color import rgb_to_hsv

    return Built(lambda x: rgb_to_hsv(x).mean((2,)), torch.rand(8, 3, 4, 4) * 0.8 + 0.1)


@case("kornia/warp-affine")
def warp() -> Built:
    from kornia.geometry.transform import warp_affine

    image = torch.rand(1, 1, 8, 8)

    def func(theta: Tensor) -> Tensor:
        moved = theta.view(-1, 2, 3) + torch.eye(2, 3)
        return warp_affine(image.expand(len(theta), 1, 8, 8), moved, (4, 4)).flatten(1)

    return Built(func, 0.1 * torch.randn(16, 6))


@case("kornia/rotate")
def rotate() -> Built:
    from kornia.geometry.transform import rotate as turned

    image = torch.rand(1, 1, 8, 8)
    return Built(lambda a: turned(image.expand(len(a), 1, 8, 8), 10 * a[:, 0]).mean(2).flatten(1), torch.randn(16, 1))


@case("kornia/gaussian-blur")
def blur() -> Built:
    from kornia.filters import gaussian_blur2d

    return Built(lambda x: gaussian_blur2d(x, (3, 3), (1.0, 1.0)).mean(2).flatten(1), torch.rand(8, 1, 8, 8))


@case("kornia/sobel")
def sobel() -> Built:
    from kornia.filters import Sobel

    edges = Sobel()
    return Built(lambda x: edges(x).mean(2).flatten(1), torch.rand(8, 1, 8, 8))


@case("kornia/ssim")
def ssim() -> Built:
    from kornia.metrics import ssim as similarity

    target = torch.rand(1, 1, 8, 8)
    return Built(lambda x: similarity(x, target.expand_as(x), 3).mean(2).flatten(1), torch.rand(8, 1, 8, 8))


@case("kornia/homography-warp")
def homography() -> Built:
    from kornia.geometry.linalg import transform_points

    points = torch.rand(1, 6, 2)

    def func(h: Tensor) -> Tensor:
        matrix = torch.cat([h, torch.zeros_like(h[:, :1])], 1).view(-1, 3, 3) + torch.eye(3)
        return transform_points(matrix, points.expand(len(h), 6, 2)).flatten(1)

    return Built(func, 0.1 * torch.randn(32, 8))


@case("pypose/so3-exp")
def pypose_so3() -> Built:
    import pypose

    return Built(lambda v: pypose.so3(v).Exp().matrix().flatten(1), torch.randn(16, 3))


@case("pypose/se3-act")
def pypose_se3() -> Built:
    import pypose

    points = torch.randn(1, 4, 3)
    return Built(lambda v: (pypose.se3(v).Exp().unsqueeze(-2) * points).flatten(1), torch.randn(16, 6))


@case("pypose/quaternion-log")
def pypose_log() -> Built:
    import pypose

    def func(q: Tensor) -> Tensor:
        return pypose.SO3(q / q.norm(dim=-1, keepdim=True)).Log().tensor()

    return Built(func, torch.randn(16, 4) * 0.2 + torch.tensor([0, 0, 0, 1.0]))
