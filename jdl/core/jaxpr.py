"""The evaluator of jaxprs, and all that depends on JAX's version of them (0.8 to 0.12).

Other files use primitives' names and public parameters only.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from jdl.core.types import PyTree

_REMAT = ("remat", "remat2", "checkpoint")
CALLS = ("jit", "pjit", "closed_call", "core_call", "call", "eval_jaxpr", *_REMAT)
as_function = jex.jaxpr_as_fun  # program -> its function of arrays
CUSTOM = ("custom_jvp_call", "custom_vjp_call")  # calls with their own derivative rule


class Site(NamedTuple):
    """One equation of a program."""

    eqn: Any  # the equation
    # The numbers of the equations and branches that lead to it, unique in the program.
    place: tuple[int, ...]
    times: int  # how often the scans around it run it

    @property
    def name(self) -> str:
        """The primitive's name."""
        return str(self.eqn.primitive.name)


class Evaluator(NamedTuple):
    """Evaluates programs equation by equation, calling `visit` for each.

    Attributes:
      visit: (site, inputs, state) -> (outputs, state), or None for the outputs of `inside`. State
        is carried through branches and loops, which must keep its shapes.
      leave: turns values into plain arrays before they enter a loop, as carry or slices, or leave a
        branch or a loop's body; needed where `visit` returns pytrees that wrap an array.
      slices: likewise for the arrays that a scan runs over; by default `leave`. May return pytrees
        that wrap an array, and have the structure of what wraps its slices.
      custom: whether to look inside calls with their own derivative rule; not where outputs are
        differentiated, for they lose the rule.

    >>> program = jax.make_jaxpr(lambda x: 2 * jax.jit(jax.numpy.sin)(x))(1.0)
    >>> evaluator = Evaluator(lambda site, inputs, state: print(site.name, site.place))
    >>> [float(y) for y in evaluator.run(program, [0.0])[0]]
    jit (0,)
    sin (0, 0)
    mul (1,)
    [0.0]
    """

    visit: Callable[[Site, list[Any], PyTree], tuple[list[Any], PyTree] | None]
    leave: Callable[[list[Any]], list[Any]] = list
    slices: Callable[[list[Any]], list[Any]] | None = None
    custom: bool = False

    def run(
        self,
        program: Any,
        args: Sequence[Any],
        state: PyTree = (),
        place: tuple[int, ...] = (),
        times: int = 1,
    ) -> tuple[list[Any], PyTree]:
        """The outputs of a program from `jax.make_jaxpr`, or of one inside of it; and the state."""
        jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else values[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            inputs, site = [read(atom) for atom in eqn.invars], Site(eqn, (*place, i), times)
            with eqn.ctx.manager:
                seen = self.visit(site, inputs, state)
                outputs, state = self.inside(site, inputs, state) if seen is None else seen
            values |= zip(eqn.outvars, outputs, strict=True)
        return [read(atom) for atom in jaxpr.outvars], state

    def inside(self, site: Site, inputs: list[Any], state: PyTree) -> tuple[list[Any], PyTree]:
        """An equation's outputs, visiting its body: calls, checkpoints, scans, branches, loops.

        Other equations are evaluated as they are, as is a while loop whose condition `jax.vmap`
        made one for each example. A while loop's condition is not visited.
        """
        eqn, params = site.eqn, site.eqn.params
        if site.name == "cond":
            index, *operands = inputs
            branches = [
                lambda state, *args, j=j, body=body: self._body(site, body, args, state, j)
                for j, body in enumerate(params["branches"])
            ]
            return jax.lax.switch(*self.leave([index]), branches, state, *operands)
        if site.name == "scan":
            return self._scan(site, inputs, state)
        if site.name == "while" and not params["cond_jaxpr"].out_avals[0].shape:
            return self._while(site, inputs, state)
        if site.name not in (CALLS + CUSTOM if self.custom else CALLS):
            return bind(eqn, inputs), state

        def call(state: PyTree, *args: Any) -> Any:
            body = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
            return self.run(body, args, state, site.place, site.times)

        if site.name in _REMAT:
            options = {k: params[k] for k in ("prevent_cse", "policy")}
            call = jax.checkpoint(call, **options)
        return call(state, *inputs)

    def _body(
        self, site: Site, body: Any, args: Sequence[Any], state: PyTree, *branch: int
    ) -> tuple[list[Any], PyTree]:
        times = site.times * site.eqn.params.get("length", 1)
        outputs, state = self.run(body, args, state, (*site.place, *branch), times)
        return self.leave(outputs), state

    def _scan(self, site: Site, inputs: list[Any], state: PyTree) -> tuple[list[Any], PyTree]:
        params = site.eqn.params
        n, m = scan_groups(site.eqn)

        def step(carry: Any, xs: list[Any]) -> Any:
            args = [*inputs[:n], *carry[0], *xs]
            outputs, state = self._body(site, params["jaxpr"], args, carry[1])
            return (outputs[: m - n], state), outputs[m - n :]

        first = self.leave(inputs[n:m]), state
        options = {k: params[k] for k in ("length", "reverse", "unroll")}
        xs = (self.slices or self.leave)(inputs[m:])
        (last, state), ys = jax.lax.scan(step, first, xs, **options)
        return [*last, *ys], state

    def _while(self, site: Site, inputs: list[Any], state: PyTree) -> tuple[list[Any], PyTree]:
        params = site.eqn.params
        n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        test, constants = as_function(params["cond_jaxpr"]), self.leave(inputs[:n])
        return jax.lax.while_loop(
            lambda carry: test(*constants, *carry[0])[0],
            lambda carry: self._body(
                site, params["body_jaxpr"], [*inputs[n:m], *carry[0]], carry[1]
            ),
            (self.leave(inputs[m:]), state),
        )


def bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of an equation for these inputs."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Up to JAX 0.9 functions are returned apart from the other parameters.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def scan_groups(eqn: Any) -> tuple[int, int]:
    """Where among a scan's inputs its carry begins, and where its slices."""
    params = eqn.params
    if "num_consts" in params:  # before JAX 0.12
        n, carry = params["num_consts"], params["num_carry"]
    else:
        n, carry, _ = map(len, params["ft_in"].unpack())
    return n, n + carry


def equations(program: Any, closed: str = "") -> Iterator[Any]:
    """A program's equations and those inside of them, except inside the primitive `closed`."""
    for eqn in getattr(program, "jaxpr", program).eqns:
        yield eqn
        for value in () if eqn.primitive.name == closed else eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner, closed)


def depend(program: Any, marks: Sequence[bool]) -> list[bool]:
    """For each output of a program, whether it depends on an input that is marked.

    Every output of a loop or a branch depends on all of its inputs.

    >>> both = jax.make_jaxpr(jax.jit(lambda x, y: (2 * x, x + y)))(1.0, 1.0)
    >>> depend(both, [False, True])
    [False, True]
    """
    jaxpr = getattr(program, "jaxpr", program)
    marked = {id(var) for var, mark in zip(jaxpr.invars, marks, strict=True) if mark}
    for eqn in jaxpr.eqns:
        given = [id(x) in marked for x in eqn.invars]
        found = [any(given)] * len(eqn.outvars)
        if any(given) and eqn.primitive.name in CALLS + CUSTOM:
            found = depend(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), given)
        marked |= {id(var) for var, mark in zip(eqn.outvars, found, strict=True) if mark}
    return [id(x) in marked for x in jaxpr.outvars]


def scans(program: Any) -> Iterator[tuple[Any, int]]:
    """The bodies and lengths of the outermost scans of a program."""
    found = (e.params for e in equations(program, "scan") if e.primitive.name == "scan")
    return ((params["jaxpr"], params["length"]) for params in found)


def lacks_forward_mode(program: Any) -> bool:
    """Whether a program, or a product from `jax.linearize`, pushes through a `jax.custom_vjp`.

    JAX raises only when it compiles it.
    """
    program = program.func.args[0] if callable(program) else program
    return any(eqn.primitive.name == "custom_lin" for eqn in equations(program))


def place_of(call: Any) -> str:
    """The name, file and line of the function in a `custom_vjp_call`."""
    return str(call.params["call_jaxpr"].jaxpr.debug_info.func_src_info)
