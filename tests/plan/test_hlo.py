"""Collectives of compiled programs, and of lines as the compilers of accelerators print them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dsad.core.mesh import MeshConfig, make_mesh
from dsad.plan.hlo import Collective, collectives, summary, wire_bytes

COLUMNS, ROWS = ((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))


def compiled(function, in_specs, out_specs, *shapes):
    """Collectives of a function of one device, on a 4 × 2 mesh."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return collectives(jax.jit(mapped).lower(*arguments).compile().as_text())


def facts(c):
    return c.kind, c.shapes, c.result_bytes, c.operand_bytes, c.group_size, c.count, c.exact


def test_sum_in_a_loop_counts_every_pass():
    def function(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c * 1.5, "data"), None), x, None, length=5)[
            0
        ]

    (found,) = compiled(function, P(("data", "fsdp")), P(("data", "fsdp")), (16, 3))
    assert facts(found) == ("all-reduce", ("f32[2,3]",), 24, 24, 4, 5, True)
    assert found.groups == COLUMNS
    assert found.op_name.endswith("psum")
    assert wire_bytes(found) == 2 * 3 / 4 * 24


def test_loops_in_loops_multiply():
    def inner(c, _):
        return jax.lax.psum(jnp.sin(c), "fsdp"), None

    def outer(c, _):
        c = jax.lax.psum(c, "data")
        return jax.lax.scan(inner, c, None, length=3)[0], None

    def function(x):
        return jax.lax.scan(outer, x, None, length=7)[0]

    found = compiled(function, P(("data", "fsdp")), P(("data", "fsdp")), (16, 3))
    assert {(c.groups, c.count) for c in found} == {(COLUMNS, 7), (ROWS, 21)}


def test_loop_that_ends_on_data_is_not_counted_as_known():
    def function(x):
        def more(c):
            return jnp.sum(c) < 100.0

        return jax.lax.while_loop(more, lambda c: jax.lax.psum(c, ("data", "fsdp")), x)

    (found,) = compiled(function, P(None), P(None), (4,))
    assert (found.count, found.exact, found.group_size) == (1, False, 8)


def test_gather_scatter_permute_and_exchange():
    def function(x, y):
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
        outer = jnp.dot(gathered, gathered.T, precision="highest")
        return (
            gathered,
            jax.lax.psum_scatter(outer, "data", tiled=True),
            jax.lax.ppermute(y, "data", [(0, 1), (1, 0)]),
            jax.lax.all_to_all(y.reshape(4, -1), "data", 0, 0),
        )

    specs = (P(("data", "fsdp")), P("data"))
    outs = (P("data"), P(("data", "fsdp")), P("data"), P("data"))
    found = {c.kind: c for c in compiled(function, specs, outs, (64, 5), (32,))}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    permute, exchange = found["collective-permute"], found["all-to-all"]
    assert facts(gather) == ("all-gather", ("f32[16,5]",), 320, 160, 2, 1, True)
    assert gather.groups == ROWS
    assert facts(scatter) == ("reduce-scatter", ("f32[4,16]",), 256, 1024, 4, 1, True)
    assert facts(permute) == ("collective-permute", ("f32[8]",), 32, 32, 2, 1, True)
    assert set(permute.groups) == {(0, 2), (2, 0), (1, 3), (3, 1)}
    # The CPU compiler exchanges one array per peer.
    assert facts(exchange)[2:] == (32, 32, 4, 1, True)
    assert len(found) == 4
    assert wire_bytes(gather) == 160
    assert wire_bytes(scatter) == 3 / 4 * 1024
    assert wire_bytes(permute) == 32
    assert wire_bytes(exchange) == 3 / 4 * 32
    assert [r[4] for r in summary(list(found.values()))] == [768, 160, 32, 24]


def test_program_of_one_device_has_none():
    assert collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()) == []


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="expected the text of a module"):
        collectives("module @jit_f { func.func public @main() }")


HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
ADD = """%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

"""


def entry(lines, *before):
    """Collectives of a module whose entry has these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    text = HEADER + ADD + "".join(before)
    text += "ENTRY %main (p: f32[128,8]) -> f32[] {\n  %p = f32[128,8]{1,0} parameter(0)\n"
    return collectives(f"{text}{body}\n  ROOT %end = f32[]{{:T(128)}} constant(0)\n}}\n")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", COLUMNS),
        ("{}", (tuple(range(8)),)),
        ("[4,2]<=[8]", ROWS),
        ("[2,4]<=[4,2]T(1,0)", COLUMNS),
        ("[1,8]<=[8]", (tuple(range(8)),)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}", ROWS),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", COLUMNS),
        ("mesh['a'=8,'b'=1] {'a','b'}", (tuple(range(8)),)),
        ("mesh['a'=4,'b'=2] {'a'}", COLUMNS),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(2)4}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ],
)
def test_notations_of_groups(text, groups):
    (found,) = entry(
        [
            f"%r = f32[128,8]{{1,0}} all-reduce(%p), channel_id=3, replica_groups={text}, "
            'use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(step)/dot"}'
        ]
    )
    assert found.groups == groups
    assert found.group_size == len(groups[0])
    assert found.op_name == "jit(step)/dot"


def test_ids_of_replicas_span_all_partitions():
    line = "%r = f32[128,8]{1,0} all-reduce(%p), channel_id=3, replica_groups={{0}}, to_apply=%add"
    assert entry([line])[0].groups == (tuple(range(8)),)


def test_long_tuples_are_one_operation():
    arrays = [f"bf16[{n},8]{{1,0:T(8,128)(2,1)S(1)}}" for n in range(1, 7)]
    kind = f"({', '.join(arrays[:5])}, /*index=5*/{arrays[5]})"
    (found,) = entry(
        [
            f"%all-reduce.3 = {kind} all-reduce(%p, %p, %p, %p, %p, /*index=5*/%p), channel_id=1, "
            "replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%add"
        ]
    )
    assert found.shapes == tuple(f"bf16[{n},8]" for n in range(1, 7))
    assert found.result_bytes == found.operand_bytes == 21 * 8 * 2


def test_halves_count_once():
    groups = "channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true"
    found = entry(
        [
            f"%g = (f32[128,8]{{1,0}}, f32[512,8]{{1,0}}) all-gather-start(%p), {groups}",
            "%gd = f32[512,8]{1,0} all-gather-done(%g)",
            "%two = ((f32[8]{0}, s8[4]{0}), (f32[32]{0}, s8[16]{0})) "
            f"all-gather-start(%p, %p), {groups}",
            "%twod = (f32[32]{0}, s8[16]{0}) all-gather-done(%two)",
            f"%r = (f32[128,8]{{1,0}}, bf16[3]{{0}}) all-reduce-start(%p, %p), {groups}, "
            "to_apply=%add",
            "%rd = (f32[128,8]{1,0}, bf16[3]{0}) all-reduce-done(%r)",
            "%c = (f32[128,8]{1,0}, f32[128,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%p), channel_id=2, source_target_pairs={{0,1},{1,0}}",
            "%cd = f32[128,8]{1,0} collective-permute-done(%c)",
            "%s = ((f32[128,8]{1,0}), f32[32,8]{1,0}, u32[]) async-start(%p), calls=%wrapped",
            "%sd = f32[32,8]{1,0} async-done(%s), calls=%wrapped",
        ],
        "%wrapped (q: f32[128,8]) -> f32[32,8] {\n  %q = f32[128,8]{1,0} parameter(0)\n"
        f"  ROOT %w = f32[32,8]{{1,0}} reduce-scatter(%q), {groups}, to_apply=%add\n}}\n\n",
    )
    full = 128 * 8 * 4
    assert {c.name: (c.kind, c.operand_bytes, c.result_bytes, c.count) for c in found} == {
        "g": ("all-gather", full, 4 * full, 1),
        "two": ("all-gather", 36, 144, 1),
        "r": ("all-reduce", full + 6, full + 6, 1),
        "c": ("collective-permute", full, full, 1),
        "w": ("reduce-scatter", full, full // 4, 1),
    }


def test_fused_start_is_counted_once_and_a_fused_slice_scatters():
    gather = (
        "bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=9, replica_groups=[4,2]<=[8], "
        'dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}'
    )

    def fused(name, root):
        return (
            f"%{name} (q: bf16[32,8]) -> bf16[64,8] {{\n  %q = bf16[32,8]{{1,0}} parameter(0)\n"
            f"  %g.{name} = {gather}\n  ROOT %root.{name} = {root}\n}}\n\n"
        )

    call = "(bf16[32,8], bf16[64,8], u32[]{:S(2)}) custom-call(%g.start), custom_call_target="
    found = entry(
        [
            "%a = (bf16[32,8], bf16[64,8], u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start",
            "%b = (f32[2], bf16[64,8]) fusion(%a), kind=kOutput, calls=%carry",
            "%d = bf16[64,8]{1,0} fusion(%b), kind=kCustom, calls=%done",
            "%e = f32[64,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
        ],
        fused("start", f'{call}"AsyncCollectiveStart"'),
        fused("carry", "(f32[2], bf16[64,8]) tuple(%q, %g.carry)"),
        fused("done", f'{call}"AsyncCollectiveDone"'.replace("%g.start", "%g.done")),
        "%all-reduce-scatter.1 (q: f32[128,8]) -> f32[64,8] {\n"
        "  %q = f32[128,8]{1,0:T(8,128)} parameter(0)\n"
        "  %r = f32[128,8]{1,0:T(8,128)} all-reduce(%q), channel_id=5, replica_groups={{0,1},{2,3}"
        ",{4,5},{6,7}}, use_global_device_ids=true, to_apply=%add\n"
        "  %i = u32[] partition-id()\n"
        "  ROOT %s = f32[64,8]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={64,8}\n}\n\n",
    )
    assert [(c.kind, c.operand_bytes, c.result_bytes, c.count) for c in found] == [
        ("all-gather", 512, 1024, 1),
        ("reduce-scatter", 4096, 2048, 1),
    ]
    assert found[1].shapes == ("f32[64,8]",)


def loop(start, bound, step, direction, config=""):
    """Executions of a sum in a loop as the TPU compiler prints it, and whether they are known."""
    state = "(s32[]{:T(128)}, f32[128,8]{1,0:T(8,128)S(1)}, s32[]{:T(128)})"
    plain = "(state: (s32[], f32[128,8], s32[]))"
    body = f"""%body {plain} -> (s32[], f32[128,8], s32[]) {{
  %one = s32[]{{:T(128)}} constant({step})
  %state = {state} parameter(0)
  %x = f32[128,8]{{1,0}} get-tuple-element(%state), index=1
  %r = f32[128,8]{{1,0}} all-reduce(%x), replica_groups={{}}, to_apply=%add
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %next = s32[]{{:T(128)}} add(%i, %one)
  %n = s32[]{{:T(128)}} get-tuple-element(%state), index=2
  ROOT %out = {state} tuple(%next, %r, %n)
}}

"""
    condition = f"""%condition {plain} -> pred[] {{
  %state = {state} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %n = s32[]{{:T(128)}} get-tuple-element(%state), index=2
  ROOT %less = pred[]{{:T(512)}} compare(%i, %n), direction={direction}
}}

"""
    found = entry(
        [
            f"%start = s32[]{{:T(128)}} {start}",
            "%begin = s32[]{:T(128)} copy(%start)",
            f"%bound = s32[]{{:T(128)}} constant({bound})",
            f"%tuple = {state} tuple(%begin, %p, %bound)",
            f"%loop = {state} while(%tuple), condition=%condition, body=%body{config}",
        ],
        body,
        condition,
    )
    return [(c.count, c.exact) for c in found]


@pytest.mark.parametrize(
    ("start", "bound", "step", "direction", "count"),
    [(0, 24, 1, "LT", 24), (2, 9, 2, "LE", 4), (23, -1, -1, "GT", 24), (1, 7, 3, "NE", 2)],
)
def test_trip_counts_from_the_condition(start, bound, step, direction, count):
    assert loop(f"constant({start})", bound, step, direction) == [(count, True)]


def test_loop_that_never_runs_holds_nothing():
    assert loop("constant(5)", 5, 1, "LT") == []


def test_trip_counts_that_are_written_down_or_unknown():
    config = ', backend_config={"known_trip_count":{"n":"12"}}'
    assert loop("parameter(1)", 24, 1, "LT", config) == [(12, True)]
    assert loop("parameter(1)", 24, 1, "LT") == [(1, False)]
    assert loop("constant(0)", 24, -1, "LT") == [(1, False)]


@pytest.mark.parametrize(
    ("kind", "operand", "result", "n", "expected"),
    [
        ("all-reduce", 800, 800, 8, 1400),
        ("all-gather", 100, 800, 8, 700),
        ("reduce-scatter", 800, 100, 8, 700),
        ("all-to-all", 800, 800, 4, 600),
        ("collective-broadcast", 800, 800, 4, 800),
        ("all-reduce", 800, 800, 1, 0),
    ],
)
def test_ring_formulas(kind, operand, result, n, expected):
    c = Collective(
        kind=kind, name="", shapes=(), result_bytes=result, operand_bytes=operand, group_size=n,
        groups=(tuple(range(n)),), count=1, exact=True, op_name="",
    )  # fmt: skip
    assert wire_bytes(c) == expected
