# SPDX-License-Identifier: Apache-2.0
"""Solvers on problems whose fixed points are known, in float64, and beside the torchdeq package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import Anderson, Broyden, Picard, StopReason, absolute_residual, make_solver, solve
from deq_flow_ros.equilibrium.solvers import Solver

SOLVERS: list[Solver] = [Picard(), Picard(0.7), Anderson(), Broyden()]
ACCELERATED: list[Solver] = [Anderson(), Anderson(window=2), Broyden(), Broyden(memory=3)]


def matrix(norm: float, dim: int = 40) -> tuple[Tensor, Tensor]:
    """A (dim, dim) of this spectral norm and b (3, dim), float64."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    b = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    return norm * a / torch.linalg.matrix_norm(a, 2), b


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_linear_and_tanh_problems_are_solved(solver: Solver) -> None:
    """Why: the one thing a solver is for: 1e-8 of the closed form, and of a fixed point iterated to the last bit."""
    a, b = matrix(0.95)
    linear = torch.linalg.solve(torch.eye(len(a), dtype=torch.float64) - a, b.T).T
    network = torch.zeros_like(b)
    for _ in range(500):
        network = torch.tanh(1.2 * network @ a.T + b)
    for f, expected in (
        (lambda z: (z @ a.T + b,), linear),
        (lambda z: (torch.tanh(1.2 * z @ a.T + b),), network),
    ):
        solution = solve(
            f, (torch.zeros_like(b),), solver=solver, max_iterations=100, tolerance=1e-11, measure=absolute_residual
        )
        torch.testing.assert_close(solution.state[0], expected, atol=1e-8, rtol=0)
        assert set(solution.stop_reasons) == {StopReason.CONVERGED}


def expansive(z: Tensor) -> tuple[Tensor]:
    """Slope between -4 and -2: Picard moves away from the one fixed point, whatever the start."""
    return (-3 * z + torch.sin(z) + 2,)


@pytest.mark.parametrize("solver", ACCELERATED, ids=str)
def test_a_map_that_picard_cannot_solve(solver: Solver) -> None:
    """Why: this is what the accelerated solvers are there for; Picard must say that it diverged."""
    expected = torch.zeros(1, 1, dtype=torch.float64)
    for _ in range(50):  # Newton
        expected = expected - (expansive(expected)[0] - expected) / (-4 + torch.cos(expected))
    start = torch.tensor([[-1.0]], dtype=torch.float64)
    solution = solve(expansive, (start,), solver=solver, max_iterations=60, tolerance=1e-11, measure=absolute_residual)
    assert solution.stop_reasons == (StopReason.CONVERGED,)
    torch.testing.assert_close(solution.state[0], expected, atol=1e-8, rtol=0)
    assert solve(expansive, (start,), max_iterations=60).stop_reasons == (StopReason.DIVERGED,)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("cap", [1, 2, 3])
def test_small_caps_count(solver: Solver, cap: int) -> None:
    """Why: robots run on one to three iterations. Each must be made, and the answer must not be worse for it."""
    a, b = matrix(0.5)
    calls = []

    def f(z: Tensor) -> tuple[Tensor]:
        calls.append(z)
        return (z @ a.T + b,)

    start = torch.zeros_like(b)
    solution = solve(f, (start,), solver=solver, max_iterations=cap, measure=absolute_residual)
    assert len(calls) == cap == solution.evaluations and (solution.iterations == cap).all()
    if cap == 1:
        assert torch.equal(solution.state[0], b)  # f(0), for every solver
    previous = solve(f, (start,), solver=solver, max_iterations=cap - 1, measure=absolute_residual) if cap > 1 else None
    assert previous is None or (solution.residual < previous.residual).all()
    torch.testing.assert_close(solution.state[0], f(solution.previous[0])[0])


@pytest.mark.parametrize("solver", ACCELERATED, ids=str)
def test_fewer_evaluations_than_picard(solver: Solver) -> None:
    """Why: an acceleration that does not accelerate is none. Eigenvalues to 0.97, as in a slowly settling flow."""
    values = torch.linspace(-0.3, 0.97, 30, dtype=torch.float64)
    problem = (lambda z: (values * z + 1,), (torch.zeros(2, 30, dtype=torch.float64),))
    settings = {"max_iterations": 2000, "tolerance": 1e-9, "measure": absolute_residual}
    picard = int(solve(*problem, **settings).iterations.max())
    found = solve(*problem, solver=solver, **settings)
    assert set(found.stop_reasons) == {StopReason.CONVERGED}
    assert int(found.iterations.max()) < 0.5 * picard, picard


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=str)
def test_a_state_of_several_tensors_and_a_batch_is_as_one_at_a_time(solver: Solver) -> None:
    """Why: states are tuples of any shapes, and no sample may learn from another's history."""
    a, b = matrix(0.95, dim=24)

    def apart(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(torch.cat((u.flatten(1), v), 1) @ a.T + b[: len(u)])
        return z[:, :18].reshape(-1, 2, 3, 3), z[:, 18:]

    def joined(z: Tensor) -> tuple[Tensor]:
        return (torch.tanh(z @ a.T + row),)

    zeros = torch.zeros(3, 24, dtype=torch.float64)
    u, v = solve(apart, (zeros[:, :18].reshape(-1, 2, 3, 3), zeros[:, 18:]), solver=solver, max_iterations=9).state
    for sample in range(3):
        row = b[sample : sample + 1]
        alone = solve(joined, (zeros[:1],), solver=solver, max_iterations=9).state[0]
        torch.testing.assert_close(torch.cat((u[sample].flatten(), v[sample])), alone[0], atol=1e-10, rtol=0)


def test_anderson_falls_back_to_picard_where_its_system_is_singular() -> None:
    """Why: two equal residuals must not end in a division by zero, nor in an exception, for the sample or its batch."""

    def f(z: Tensor) -> tuple[Tensor]:
        return (torch.cat((z[:1] + 1, 0.5 * z[1:] + 1)),)  # constant residual; contraction

    start = torch.zeros(2, 3, dtype=torch.float64)
    alone = solve(f, (start,), solver=Anderson(regularization=0), max_iterations=6, keep=(6,)).trajectory[6]
    torch.testing.assert_close(alone, solve(f, (start,), max_iterations=6).state)
    regularized = solve(f, (start,), solver=Anderson(), max_iterations=6, keep=(6,)).trajectory[6]
    assert torch.isfinite(regularized[0]).all()
    factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    attached = solve(lambda z: (f(z)[0] * factor,), (start,), solver=Anderson(regularization=0), max_iterations=6)
    (gradient,) = torch.autograd.grad(attached.state[0].sum(), factor)
    assert torch.isfinite(gradient)
    torch.testing.assert_close(regularized[0][1], torch.full((3,), 2.0, dtype=torch.float64))


def test_anderson_goes_back_to_its_best_point_when_a_mixture_fails() -> None:
    """Why: an extrapolation over a kink may land far off; the solve must not go on from there."""
    visited: list[float] = []

    def kinked(z: Tensor) -> tuple[Tensor]:
        visited.append(float(z))
        return (torch.where(z < 1.5, 0.9 * z + 0.2, 0.2 * z - 6),)  # towards 2, which lies beyond the kink

    solution = solve(kinked, (torch.zeros(1, 1, dtype=torch.float64),), solver=Anderson(), max_iterations=12)
    values = [float(kinked(torch.tensor([[z]]))[0]) for z in visited[:12]]
    residuals = [abs(value - z) for value, z in zip(values, visited, strict=False)]
    failed = next(i for i in range(2, 12) if residuals[i] > 2 * min(residuals[:i]))
    best = min(range(failed), key=residuals.__getitem__)
    assert visited[failed + 1] == pytest.approx(values[best])
    smallest = min(residual / abs(value) for residual, value in zip(residuals, values, strict=True))
    assert float(solution.residual) == pytest.approx(smallest)


@pytest.mark.parametrize("solver", ACCELERATED, ids=str)
def test_a_step_to_where_f_is_not_defined_is_taken_back(solver: Solver) -> None:
    """Why: what Picard solves, an accelerated solver must not give up because it overshot once."""

    def f(z: Tensor) -> tuple[Tensor]:
        return (z - 0.018 * torch.log(z / 0.02),)  # NaN for negative z; the first secant leads there

    start = torch.tensor([[3.0]], dtype=torch.float64)
    solution = solve(f, (start,), solver=solver, max_iterations=400, tolerance=1e-10, measure=absolute_residual)
    assert solution.trace.isnan().any(), "nothing overshot: the test tests nothing"
    assert solution.stop_reasons == (StopReason.CONVERGED,)
    torch.testing.assert_close(solution.state[0], torch.full((1, 1), 0.02, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CONTRIBUTING.md")
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_host_never_waits_for_the_gpu(solver: Solver) -> None:
    """Why: a wait in every iteration costs more than it; PyTorch raises at any operation that synchronizes."""
    a, b = (tensor.cuda() for tensor in matrix(0.95))
    problem = (lambda z: (torch.tanh(z @ a.T + b),), (torch.zeros_like(b),))
    solve(*problem, solver=solver, max_iterations=12, tolerance=1e-6)  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        solution = solve(*problem, solver=solver, max_iterations=12, tolerance=1e-6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (solution.residual < 1e-2).all()
    easy = solve(lambda z: (0.1 * z + b,), (torch.zeros_like(b),), solver=solver, max_iterations=500, tolerance=1e-3)
    assert easy.evaluations <= int(easy.iterations.max()) + 2, "the host ran ahead of the device, past the end"


@pytest.mark.parametrize(
    ("name", "ours", "arguments", "shift"),
    [
        ("fixed_point_iter", Picard(), {}, 0),
        ("fixed_point_iter", Picard(0.6), {"tau": 0.6}, 1),
        ("anderson", Anderson(window=4, regularization=0), {"m": 4, "lam": 1e-14}, 0),
        ("broyden", Broyden(memory=50), {}, 1),
    ],
)
def test_iterates_equal_those_of_torchdeq(name: str, ours: Solver, arguments: dict, shift: int) -> None:
    """Why: an independent implementation of the same. Where shifted, it returns the point and not the value there."""
    get_solver = pytest.importorskip("torchdeq.solver", reason="torchdeq is not installed").get_solver
    a, b = matrix(0.9, dim=12)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ a.T + b)

    start = torch.zeros_like(b)
    for count in (3, 4, 6, 8):
        theirs, _, _ = get_solver(name)(f, start, max_iter=count - shift, tol=1e-14, return_final=True, **arguments)
        theirs = theirs.view_as(b)
        mine = solve(lambda z: (f(z),), (start,), solver=ours, max_iterations=count, keep=(count,)).trajectory[count]
        torch.testing.assert_close(mine[0], f(theirs) if shift else theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Picard(damping=0.0), r"damping must be in \(0, 1\], got 0"),
        (lambda: Anderson(window=1), r"window must be at least 2 .* got Anderson\(window=1"),
        (lambda: Anderson(regularization=-1.0), "regularization at least 0"),
        (lambda: Broyden(memory=0), "memory must be at least 1"),
        (lambda: make_solver("newton"), "unknown solver 'newton'; expected one of anderson, broyden"),
        (lambda: make_solver(Anderson), r"an object such as Anderson\(window=3\)"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:
    """Why: an error must say what was expected and what was got."""
    with pytest.raises((ValueError, TypeError), match=message):
        make()
