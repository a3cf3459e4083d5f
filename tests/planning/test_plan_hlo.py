"""Work counted from compiled programs, against hand arithmetic and against XLA's own count of unrolled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pixel_jax.parallel import make_mesh
from pixel_jax.planning.hlo import HLOError, WorkCounter

LAYERS, WIDTH, ROWS = 6, 32, 16


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def counted(function, *arguments, **turns):
    return WorkCounter(jax.jit(function).lower(*arguments).compile().as_text(), turns).total()


def chain(x, weights, unroll=1):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, unroll=unroll)[0]


def test_a_loop_counts_as_often_as_it_runs():
    x, weights = f32(ROWS, WIDTH), f32(LAYERS, WIDTH, WIDTH)
    by_hand = LAYERS * 2 * ROWS * WIDTH * WIDTH
    assert counted(chain, x, weights).flops == by_hand
    unrolled = jax.jit(lambda x, w: chain(x, w, unroll=LAYERS)).lower(x, weights).compile()
    tanh = LAYERS * ROWS * WIDTH  # XLA counts element-wise work, too
    assert by_hand <= unrolled.cost_analysis()["flops"] <= by_hand + 10 * tanh
    assert jax.jit(chain).lower(x, weights).compile().cost_analysis()["flops"] < by_hand / 2  # hence this module


def test_gradients_through_nested_loops_and_recomputation():
    def loss(x, weights):
        block = jax.checkpoint(lambda x, w: (chain(x, w), None))
        return jnp.sum(jax.lax.scan(block, x, weights)[0])

    outer = 3
    forward = outer * LAYERS * 2 * ROWS * WIDTH * WIDTH
    found = counted(jax.grad(loss, argnums=(0, 1)), f32(ROWS, WIDTH), f32(outer, LAYERS, WIDTH, WIDTH))
    assert found.flops == 4 * forward  # forward, once more in the backward pass, and two products of that pass


def test_batched_and_grouped_products():
    def attend(q, k):
        return jnp.einsum("btkgd,bskd->bkgts", q, k)

    assert counted(attend, f32(2, 5, 3, 4, 8), f32(2, 7, 3, 8)).flops == 2 * (2 * 3 * 4 * 5 * 7 * 8)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1,), "padding": "VALID"},
        {"window_strides": (2,), "padding": "SAME"},
        {"window_strides": (1,), "padding": [(2, 3)], "lhs_dilation": (3,)},
        {"window_strides": (2,), "padding": [(4, 4)], "rhs_dilation": (2,)},
    ],
)
def test_convolutions_count_the_products_that_exist(options):
    signal, kernel = np.ones((2, 3, 11), np.float32), np.ones((5, 3, 4), np.float32)
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, **options)
    assert counted(convolve, signal, kernel).flops == 2 * np.asarray(convolve(signal, kernel)).sum()


def test_data_decides_and_the_scope_says_how_often():
    def program(x, w):
        with jax.named_scope("turns"):
            x = jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: inner(x, w), x)
        return x

    def inner(x, w):
        with jax.named_scope("rarely"):
            return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w @ w, lambda x: x @ w, x)

    arguments = f32(ROWS, WIDTH), f32(WIDTH, WIDTH)
    one = 2 * ROWS * WIDTH * WIDTH
    assert counted(program, *arguments, turns=10, rarely=0.25).flops == pytest.approx(10 * (0.25 * 3 + 0.75) * one)
    with pytest.raises(HLOError, match="turns"):
        counted(program, *arguments)


def test_bytes_of_a_loop_are_those_of_what_it_slices():
    """A body that reads one layer of a stack reads a layer, not the stack."""
    x, weights = f32(ROWS, WIDTH), f32(LAYERS, WIDTH, WIDTH)
    found = counted(chain, x, weights).bytes
    least = 4 * LAYERS * (WIDTH * WIDTH + 2 * ROWS * WIDTH)
    assert least <= found <= 5 * least  # not LAYERS times the stack
    assert counted(lambda x, y: x + y, f32(1000), f32(1000)).bytes == 3 * 4000


FUSIONS = """
HloModule m

%slicing (p: f32[40,512], i: s32[]) -> f32[512] {
  %p = f32[40,512]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,512]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,512}
  ROOT %flat = f32[512]{0} bitcast(%one)
}

%passing (p: f32[40,512]) -> f32[40,512] {
  %p = f32[40,512]{1,0} parameter(0)
  ROOT %same = f32[40,512]{1,0:T(8,128)} copy(%p)
}

%outer (p: f32[40,512], i: s32[], v: f32[512]) -> f32[512] {
  %p = f32[40,512]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %v = f32[512]{0} parameter(2)
  %q = f32[40,512]{1,0} fusion(%p), kind=kLoop, calls=%passing
  %row = f32[512]{0} fusion(%q, %i), kind=kLoop, calls=%slicing
  ROOT %sum = f32[512]{0} add(%row, %v)
}

ENTRY %main (p: f32[40,512], i: s32[], v: f32[512]) -> f32[512] {
  %p = f32[40,512]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %v = f32[512]{0} parameter(2)
  ROOT %f = f32[512]{0} fusion(%p, %i, %v), kind=kOutput, calls=%outer
}
"""


def test_slices_in_fusions_inside_a_fusion():
    """As compilers for TPUs write them: a row of the matrix, the index, the vector, and the result."""
    assert WorkCounter(FUSIONS).total().bytes == 3 * 4 * 512 + 4
    whole = FUSIONS.replace(
        "ROOT %sum = f32[512]{0} add(%row, %v)",
        "%all = f32[40,512]{1,0} negate(%q)\n  ROOT %sum = f32[512]{0} add(%row, %v)",
    )
    assert WorkCounter(whole).total().bytes == 4 * (40 * 512 + 2 * 512) + 4


WRITING = """
HloModule m

%assign (old: f32[], new: f32[]) -> f32[] {
  %old = f32[] parameter(0)
  ROOT %new = f32[] parameter(1)
}

%write (p: f32[40,512], i: s32[3,1], v: f32[3,512]) -> f32[40,512] {
  %p = f32[40,512]{1,0} parameter(0)
  %i = s32[3,1]{1,0} parameter(1)
  %v = f32[3,512]{1,0} parameter(2)
  ROOT %s = f32[40,512]{1,0} scatter(%p, %i, %v), update_window_dims={1}, inserted_window_dims={0}, to_apply=%assign
}

ENTRY %main (p: f32[40,512], i: s32[3,1], v: f32[3,512]) -> f32[40,512] {
  %p = f32[40,512]{1,0} parameter(0)
  %i = s32[3,1]{1,0} parameter(1)
  %v = f32[3,512]{1,0} parameter(2)
  ROOT %f = f32[40,512]{1,0} fusion(%p, %i, %v), kind=kCustom, calls=%write
}
"""


def test_what_a_fusion_scatters_into_is_not_moved():
    """Three rows are read and written, as a cache takes a token of each row; the array around them stays where it is."""
    assert WorkCounter(WRITING).total().bytes == 4 * (2 * 3 * 512 + 3)


WINDOWS = """
HloModule m

%body (s: (f32[8,16], f32[16,32], f32[8,32], u32[])) -> (f32[8,16], f32[16,32], f32[8,32], u32[]) {
  %two = u32[] constant(2)
  %s = (f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}, u32[]) parameter(0)
  %dot = f32[8,32]{1,0} dot(%s#0, %s#1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %next = u32[] add(%s#3, %two)
  ROOT %out = (f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}, u32[]) tuple(%s#0, %s#1, %dot, /*index=3*/%next)
}

%condition (c: (f32[8,16], f32[16,32], f32[8,32], u32[])) -> pred[] {
  %limit = u32[] constant(5)
  %c = (f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}, u32[]) parameter(0)
  ROOT %less = pred[] compare(%c#3, %limit), direction=LT
}

ENTRY %main (p: (f32[8,16], f32[16,32], f32[8,32], u32[])) -> (f32[8,16], f32[16,32], f32[8,32], u32[]) {
  %p = (f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}, u32[]) parameter(0)
  ROOT %while = (f32[8,16]{1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}, u32[]) while(%p), condition=%condition, body=%body
}
"""


def test_a_loop_without_a_stated_count():
    """As compilers for TPUs write a product cut into windows: the counter goes up by two, so to 5 the loop runs thrice."""
    once = 2 * 8 * 16 * 32
    assert WorkCounter(WINDOWS).total().flops == 3 * once
    product, count_on, compare = 4 * (8 * 16 + 16 * 32 + 8 * 32), 4 + 4 + 4, 4 + 4 + 1
    assert WorkCounter(WINDOWS).total().bytes == 3 * (
        product + count_on + compare
    )  # of a tuple only the element that is used
    assert WorkCounter(WINDOWS.replace("constant(2)", "constant(1)")).total().flops == 5 * once
    copied = WINDOWS.replace("%next = ", "%more = ").replace("  ROOT %out", "  %next = u32[] copy(%more)\n  ROOT %out")
    assert "copy(" in copied and WorkCounter(copied).total().flops == 3 * once  # as the compiler for a TPU7x writes it
    for unclear in (("direction=LT", "direction=NE"), ("add(%s#3, %two)", "add(%s#3, %s#3)")):
        with pytest.raises(HLOError, match="while runs is not known"):
            WorkCounter(WINDOWS.replace(*unclear)).total()


KERNEL = """
HloModule kernel

ENTRY %main (a: s8[1,4,6], q: bf16[2,8,2048,128], k: bf16[2,2,3072,128]) -> bf16[2,8,2048,2048] {
  %a = s8[1,4,6]{2,1,0} parameter(0)
  %q = bf16[2,8,2048,128]{3,2,1,0} parameter(1)
  %k = bf16[2,2,3072,128]{3,2,1,0} parameter(2)
  %splash_mha_fwd_no_residuals.1 = bf16[2,8,2048,128]{3,2,1,0} custom-call(%a, %q, %k, %k), frontend_attributes={metadata={
"more":"{\\"block\\": 512}"
}}, metadata={op_name="kernel"}
  ROOT %square = bf16[2,8,2048,2048]{3,2,1,0} dot(%q, %q), lhs_contracting_dims={3}
}
"""


@pytest.mark.parametrize("kind, products, again", [("fwd", 2, 3 * 3072), ("dq", 3, 3 * 3072), ("dkv", 4, 5 * 2048)])
def test_attention_kernels(kind, products, again):
    """Products of all queries and keys; what a tile needs of the other axis is read once for each of 4 x 6 tiles and head.

    The product after the kernel is counted, too, although the kernel's attributes go over several lines.
    """
    after = WorkCounter(KERNEL.replace("splash", "unknown")).total()
    assert after.flops == 2 * 2 * 8 * 2048 * 2048 * 128
    found = WorkCounter(KERNEL.replace("fwd", kind)).total()
    flops, moved = found.flops - after.flops, found.bytes - after.bytes
    assert flops == products * 2 * 2 * 8 * 2048 * 3072 * 128
    one = KERNEL.replace("fwd", kind).replace("[2,8,", "[8,").replace("[2,2,", "[2,")  # without the batch
    assert WorkCounter(one.replace("={3}", "={2}")).total().flops == found.flops / 2
    assert moved == 2 * (2 * 2 * 8 * again * 128)  # numbers of two bytes


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 1, "fsdp": 4, "tensor": 2})


def on(mesh, array, *spec):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def test_what_devices_send(mesh):
    weights, x = f32(LAYERS, WIDTH, WIDTH), f32(ROWS, WIDTH)
    split = on(mesh, weights, None, "fsdp"), on(mesh, x, "fsdp")
    spread = NamedSharding(mesh, PartitionSpec("fsdp"))

    def gathers(weights, x):
        gathered = jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, PartitionSpec()))
        return jax.lax.with_sharding_constraint(chain(x, gathered), spread)

    found = counted(gathers, *split)
    assert found.flops == LAYERS * 2 * (ROWS / 4) * WIDTH * WIDTH  # of one device
    assert found.sent["all-gather"] == pytest.approx(4 * LAYERS * WIDTH * WIDTH * 3 / 4)
    whole = lambda x: jax.lax.with_sharding_constraint(jnp.sum(x, axis=0), NamedSharding(mesh, PartitionSpec()))
    found = counted(whole, on(mesh, f32(ROWS, WIDTH), "fsdp"))
    assert found.sent["all-reduce"] == pytest.approx(2 * 4 * WIDTH * 3 / 4)
    assert found.calls["all-reduce"] == 1


COLLECTIVE = """HloModule m

ENTRY %main (x: f32[64]) -> f32[64] {{
  %x = f32[64]{{0}} parameter(0)
  ROOT %y = f32[64]{{0}} {}
}}"""


@pytest.mark.parametrize("groups, size, between", [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, 0),
    ("replica_groups=[2,4]<=[8]", 4, 0),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 1),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, 1),
    ("replica_groups=[1,8]<=[8]", 8, 1 / 4),
    ("replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}", 4, 0),
    ("replica_groups=mesh['data'=2,'tensor'=4] {'data'}", 2, 1),
    ("replica_groups=mesh['data'=4,'tensor'=2] {'data':(1)2}", 2, 1),
    ("replica_groups=mesh['data'=4,'tensor'=2] {'data':(2)2}", 2, 0),
    ("replica_groups=mesh['data'=4,'tensor'=2] {'data':(2)2,'tensor'}", 4, 0),
])  # fmt: skip
def test_what_goes_to_other_nodes(groups, size, between):
    """Two nodes of four devices. In a group of all eight, four rings leave a node, each at another device."""
    text = COLLECTIVE.format(f"all-reduce(%x), {groups}, to_apply=%add")
    found = WorkCounter(text, nodes=[0, 0, 0, 0, 1, 1, 1, 1]).total()
    assert found.sent["all-reduce"] == 2 * 256 * (size - 1) / size
    assert found.between_nodes == between * found.sent["all-reduce"]
    assert WorkCounter(text).total().between_nodes == 0


def test_what_goes_to_other_nodes_one_to_one():
    nodes = [0, 0, 0, 0, 1, 1, 1, 1]
    pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}"
    found = WorkCounter(COLLECTIVE.format(f"collective-permute(%x), {pairs}"), nodes=nodes).total()
    assert (found.sent["collective-permute"], found.between_nodes) == (256, 64)
    found = WorkCounter(COLLECTIVE.format("all-to-all(%x), replica_groups=[1,8]<=[8]"), nodes=nodes).total()
    assert found.between_nodes == 256 * 4 / 8  # half of what a device holds is for the other node


GPU_KERNEL = """HloModule m

ENTRY %main (q: bf16[1,1024,4,128], k: bf16[1,512,4,128]) -> bf16[1,1024,4,128] {{
  %q = bf16[1,1024,4,128]{{3,2,1,0}} parameter(0)
  %k = bf16[1,512,4,128]{{3,2,1,0}} parameter(1)
  ROOT %y = bf16[1,1024,4,128]{{3,2,1,0}} custom-call(%q, %k), custom_call_target="__gpu$xla.gpu.triton", \
metadata={{op_name="jit(f)/{}/pallas_call"}}
}}"""


def test_kernels_of_gpus():
    product = 2 * 1024 * 512 * 4 * 128
    for name, products in (("mha_forward", 2), ("transpose(jvp(mha_backward))", 7), ("mha_preprocess_backward", 0)):
        assert WorkCounter(GPU_KERNEL.format(name)).total().flops == products * product
    with pytest.raises(HLOError, match="the work of the kernel jit.f./paged/pallas_call is not known"):
        WorkCounter(GPU_KERNEL.format("paged")).total()


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(HLOError, match="entry"):
        WorkCounter("nothing")
