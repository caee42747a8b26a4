"""Reading compiled programs: the body of a loop counts as often as it runs."""

# ruff: noqa: E501

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtok.training.compiled import Collective, read_program, shapes
from jaxtok.training.mesh import MeshConfig, make_layout


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices; tests/conftest.py simulates them")
def test_collectives_of_a_loop():
    layout = make_layout(MeshConfig(data=2, tensor=4))
    matrices = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=NamedSharding(layout.mesh, P(None, "tensor")))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(layout.mesh, P("data", "tensor")))

    def f(matrices, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(
                jnp.tanh(x @ w), NamedSharding(layout.mesh, P("data", "tensor"))
            ), None

        return jax.lax.scan(layer, x, matrices)[0]

    program = read_program(jax.jit(f).lower(matrices, x).compile().as_text())
    (one,) = program.collectives
    assert (one.kind, one.times, one.group, one.overlapped) == ("all-reduce", 5, 4, False)
    assert one.bytes == 4 * 16 * 4  # each device: 4 rows of 16 float32
    assert one.sent == 5 * 4 * 16 * 4 * 2 * 3 / 4
    assert program.operations == [] and program.cycles == 0


TPU = """\
HloModule jit_step

%fused (p0: bf16[2,8], p1: bf16[8,8]) -> bf16[2,8] {
  %p0 = bf16[2,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p1), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, frontend_attributes={chain_id="7"}, metadata={op_name="jit(step)/jvp(Decoder)/blocks/ffn/dot"}
  ROOT %dot = bf16[2,8]{1,0} dot(%p0, %all-gather.1)
}

%all-reduce-scatter.3 (input: f32[64,8]) -> f32[8,8] {
  %input = f32[64,8]{1,0} parameter(0)
  ROOT %all-reduce.5 = f32[64,8]{1,0} all-reduce(%input), replica_groups=[4,8]<=[32], to_apply=%add
}

%body (arg: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %arg = (s32[]{:T(128)}, bf16[2,8]{1,0}) parameter(0)
  %fusion.1 = bf16[2,8]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/jvp(Decoder)/blocks/ffn/dot"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %fusion.2 = bf16[2,8]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"500"}}
  %kernel.3 = (f32[2,8]{1,0}, bf16[2,4,16,8]{3,2,1,0}) custom-call(%q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"a line break"
}}, metadata={op_name="jit(step)/kernel"}
  %offload = bf16[2,8]{1,0} fusion(%a), kind=kCustom, calls=%fused, backend_config={"estimated_cycles":"18446744073709551614"}
  ROOT %tuple = (s32[], bf16[2,8]{1,0}) tuple(%i, %fusion.2)
}

%cond (arg: (s32[], bf16[2,8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %constant.9), direction=LT
}

ENTRY %main (p: f32[64,8]) -> f32[8,8] {
  %while.1 = (s32[], bf16[2,8]{1,0}) while(%init), condition=%cond, body=%body
  %permute = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %rs = f32[8,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_a_tpu_program():
    program = read_program(TPU)
    assert [(op.cycles, op.times) for op in program.operations] == [(1000, 12), (500, 12), (0, 12)]
    assert program.cycles == 12 * 1500
    gather, permute, scatter = program.collectives
    # one gather is written down in every operation beside which it runs
    assert gather == Collective("all-gather", 128, 4, 12, True, "jit(step)/jvp(Decoder)/blocks/ffn/dot")
    assert (permute.kind, permute.bytes, permute.overlapped) == ("collective-permute", 64, True)
    assert (scatter.kind, scatter.bytes, scatter.group, scatter.times) == ("reduce-scatter", 2048, 8, 1)
    assert scatter.sent == 2048 * 7 / 8


def test_shapes():
    assert shapes("(f32[2,3]{1,0}, s32[], bf16[4]{0:T(8,128)})") == [(2, 3), (), (4,)]
