"""The decode kernel for CPUs beside a naive one in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decode_reference import (
    FORMS,
    GROUPED,
    MASKS,
    MIXED,
    Side,
    attended,
    case,
    drawn,
    error,
    mask_for,
)
from naive_packed import LAYERS, naive_attention
from vdcompress.load import Base
from vdcompress.modeling import numba_compiled, numba_decode
from vdcompress.modeling.attention import latent_attention, matmul_attention
from vdcompress.modeling.decode_spans import Span
from vdcompress.modeling.numba_decode import attend_exact, attend_packed, can_decode, decode
from vdcompress.modeling.packed_cache import PackedLayer
from vdcompress.plan import make_plan
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics

TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
SCALE = 0.3


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_decode, "WORTH", 0)
    monkeypatch.setattr(numba_decode, "WORTH_PACKED", 0)


@pytest.fixture(params=[1, 2])
def threads(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Say that torch has so many: once they were set, later sums of a process differ in bits."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def check(query: Tensor, spans: list[Span], mask: Tensor | None = None) -> Tensor:
    found = decode(query, spans, mask, SCALE)
    assert found.dtype == query.dtype
    expected = attended(query, spans, mask, SCALE)
    assert error(found, expected) < TOLERANCE[query.dtype]
    return found


@pytest.mark.parametrize(("form", "bits"), FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_form_with_a_latent_for_each_head(form: str, bits: int, dtype: Any) -> None:
    tokens = 672 if form == "per_channel" else 677
    query, spans = case([(2, 40, form, bits)], (2, 24, form, bits), tokens, 2, dtype)
    check(query, spans)


@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_every_form_with_one_latent_in_several_blocks(form: str, bits: int, threads: int) -> None:
    query, spans = case([(1, 72, form, bits)], (1, 136, form, bits), 640, 8, torch.float32)
    check(query, spans)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("width", [1, 3, 17, 37, 61])
def test_widths_that_do_not_fill_words(width: int, bits: int) -> None:
    query, spans = case(
        [(2, width, "per_token", bits)], (2, width + 2, "per_token", bits), 90, 2, torch.float32
    )
    check(query, spans)


@pytest.mark.parametrize(("form", "bits"), FORMS)
@pytest.mark.parametrize("heads", [2, 6, 14])
def test_widths_with_a_scale_for_each_number(heads: int, form: str, bits: int) -> None:
    """No number of blocks but 67 divides 67; 3 and 7 queries of a latent are no whole fours."""
    query, spans = case([(2, 67, form, bits)], (2, 134, form, bits), 96, heads, torch.float32)
    check(query, spans)


@pytest.mark.parametrize("columns", [1, 2, 4, 5, 7, 8, 11, 12, 15, 16, 23])
def test_rows_of_bytes_with_two_codes_each(columns: int) -> None:
    """They are read 8 and 4 bytes at a time, and one by one where these do not fit."""
    tokens = 90 + columns % 2
    part, shared = (2, 2 * columns, "per_token", 4), (2, 24, "per_token", 4)
    check(*case([part], shared, tokens, 2, torch.float32))
    check(*case([shared], part, tokens, 6, torch.float32))


@pytest.mark.parametrize(("heads", "groups"), [*GROUPED, (14, 2)])
def test_grouped_queries(heads: int, groups: int, threads: int) -> None:
    key, value = (groups, 40, "per_token", 4), (groups, 80, "per_token", 8)
    check(*case([key], value, 90, heads, torch.float32))


@pytest.mark.parametrize(
    ("keys", "value"),
    [*MIXED, ([(8, 40, "exact", 16)], (1, 40, "exact", 16))],
)
def test_parts_with_their_own_bits_and_groups(keys: Side, value: Any) -> None:
    check(*case(keys, value, 64, 8, torch.float16))


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str) -> None:
    key, value = (2, 40, "per_token", 4), (2, 40, "per_token", 4)
    query, spans = case([key], value, 590, 4, torch.float32)
    check(query, spans, mask_for(kind, 590, torch.float32))


def test_nothing_to_attend_to_is_zero() -> None:
    query, spans = case([(1, 40, "exact", 16)], (1, 40, "exact", 16), 400, 2, torch.float32)
    mask = torch.zeros(2, 1, 1, 400, dtype=torch.bool)
    mask[1] = True
    found = decode(query, spans, mask, SCALE)
    assert not found[0].any()
    assert error(found[1:], attended(query, spans, None, SCALE)[1:]) < 4e-6


def test_small_values_beside_a_large_sink() -> None:
    """Weights far below the largest one, times values far below 1, must not vanish."""
    query, spans = case([(1, 40, "exact", 16)], (1, 40, "exact", 16), 900, 1, torch.float32)
    key, value = spans[0].keys[0].codes, spans[0].values.codes
    query[..., 0], key[..., 0] = 10, 0
    key[:, :, 0] = 0
    key[:, :, 0, 0] = 20 / (10 * SCALE)
    value *= 1e-3
    value[:, :, 0] = 0
    check(query, spans)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_what_is_no_number_stays_none(side: str) -> None:
    query, spans = case([(2, 40, "exact", 16)], (2, 40, "exact", 16), 90, 2, torch.float32)
    part = spans[0].keys[0] if side == "keys" else spans[0].values
    part.codes[0, 1, 50, 3] = torch.nan
    found = decode(query, spans, None, SCALE)
    assert found[0, 1].isnan().any()
    assert found[0, 0].isfinite().all()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_values_that_are_not_finite_stay_so(dtype: Any, number: float) -> None:
    query, spans = case([(1, 40, "exact", 16)], (1, 40, "exact", 16), 90, 1, dtype)
    spans[0].values.codes[:, :, 50, 3] = number
    found = decode(query, spans, None, SCALE)
    assert not found[..., 3].isfinite().any()
    assert found[..., 4:].isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (4, 20)])
def test_a_packed_cache(name: str, sinks: int, window: int, threads: int) -> None:
    layout, tokens = LAYERS[name], 110
    shapes = ((4, layout.k_head_dim), (layout.k_groups, layout.k_head_dim))
    shapes = (*shapes, (layout.v_groups, layout.v_head_dim))
    sides = [drawn(2, g, tokens, w, seed=5, dtype=torch.float32) for g, w in shapes]
    expected = naive_attention(*sides, layout, scaling=SCALE, sinks=sinks, window=window)
    cache = PackedLayer(layout, sinks, window)
    for stop, new in ((1, 1), (107, 106), (108, 1), (110, 2)):
        query, key, value = (x[:, :, stop - new : stop] for x in sides)
        found = attend_packed(query[:, :, -1:], *cache.update(key, value), None, SCALE)
        assert found is not None
        assert error(found, expected[:, :, stop - 1 : stop]) < 4e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_view_into_a_larger_room(dtype: Any) -> None:
    """Caches have room behind their tokens, and a beam may be a view."""
    room = drawn(3, 4, 200, 40, seed=1, dtype=dtype)
    query = drawn(2, 4, 1, 40, seed=2, dtype=dtype)
    key, value = room[1:, :, 7:150], room[1:, 2:3, 3:146, :]
    found = attend_exact(query, key, value, None, SCALE)
    expected, _ = matmul_attention(
        nn.Module().eval(), query.double(), key.double(), value.double(), None, scaling=SCALE
    )
    assert found is not None
    assert error(found.transpose(1, 2), expected) < TOLERANCE[dtype]


def test_attention_uses_it_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(numba_decode, "decode", lambda *given: seen.append(1) or given[0])
    monkeypatch.setattr(numba_decode, "WORTH", 2 * 4 * 40 * 30)
    query, x = torch.zeros(1, 4, 1, 40), torch.zeros(1, 4, 30, 40)
    module = nn.Module().eval()
    latent_attention(module, query, x[:, :, 1:], x[:, :, 1:], None, SCALE)
    assert not seen
    latent_attention(module, query, x, x, None, SCALE)
    assert seen


def test_packed_attention_uses_it_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYERS["per token, a latent for each head"]
    of_token = layout.k_groups * layout.k_head_dim + layout.v_groups * layout.v_head_dim
    monkeypatch.setattr(numba_decode, "WORTH", 2**40)
    monkeypatch.setattr(numba_decode, "WORTH_PACKED", 2 * 30 * of_token)
    cache = PackedLayer(layout, 0, 0)
    query = torch.zeros(2, 4, 1, layout.k_head_dim)
    for new, uses in ((29, False), (1, True)):
        key = torch.zeros(2, layout.k_groups, new, layout.k_head_dim)
        value = torch.zeros(2, layout.v_groups, new, layout.v_head_dim)
        given = cache.update(key, value)
        assert (attend_packed(query, *given, None, SCALE) is not None) == uses


def test_compiling_is_said_once_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba_compiled, "_met", set())
    with numba_compiled.said_if_slow("quick"):
        pass
    monkeypatch.setattr(numba_compiled, "PATIENCE", 0.0)
    with numba_compiled.said_if_slow("quick"):
        time.sleep(0.2)
    assert not caplog.messages
    for _ in range(2):
        with numba_compiled.said_if_slow("slow"):
            time.sleep(0.2)
    assert caplog.messages == [numba_compiled.COMPILES]


KERNEL = """
from vdcompress.modeling.numba_compiled import compiled


@compiled({signature!r})
def twice(x):
    return 2 * x


assert twice(4) == 8
print(*twice.stats.cache_hits.values())
"""
SIGNATURES = pytest.mark.parametrize("signature", [None, "int64(int64)"])


def ran(folder: Path, code: str) -> str:
    """Run a program whose kernels are kept in ``folder``; return what it prints."""
    (folder / "kernel.py").write_text(code)
    env = os.environ | {"NUMBA_CACHE_DIR": str(folder / "kept")}
    command = [sys.executable, folder / "kernel.py"]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of resources")
@SIGNATURES
def test_a_kernel_that_a_full_disk_does_not_keep_runs(
    signature: str | None, tmp_path: Path
) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    ran(tmp_path, limit + KERNEL.format(signature=signature))
    assert not [x for x in (tmp_path / "kept").rglob("*.nb?") if x.stat().st_size > 100]


@SIGNATURES
def test_a_kernel_is_compiled_anew_if_one_that_it_may_call_changed(
    signature: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os
from vdcompress.modeling import numba_compiled
numba_compiled._stamp_of_all = lambda: os.environ["STAMP"]
"""
    found = []
    for stamp in "1122":
        monkeypatch.setenv("STAMP", stamp)
        found.append(ran(tmp_path, code + KERNEL.format(signature=signature)).split())
    assert found == [[], ["1"], [], ["1"]]


@SIGNATURES
@pytest.mark.parametrize("broken", ["*.nbi", "*.nbc"])
def test_a_kernel_that_was_cut_off_is_compiled_anew(
    signature: str | None, broken: str, tmp_path: Path
) -> None:
    code = KERNEL.format(signature=signature)
    assert [ran(tmp_path, code).split() for _ in range(2)] == [[], ["1"]]
    for path in (tmp_path / "kept").rglob(broken):
        path.write_bytes(path.read_bytes()[:20])
    assert [ran(tmp_path, code).split() for _ in range(2)] == [[], ["1"]]


def test_what_it_does_not_know_is_left_to_others() -> None:
    one, two = torch.zeros(1, 4, 1, 40), torch.zeros(1, 4, 2, 40)
    assert can_decode(one, [torch.bfloat16])
    assert not can_decode(two, [torch.float32])
    assert not can_decode(one.double(), [torch.float64])
    assert not can_decode(one, [torch.float64])
    assert not can_decode(one.requires_grad_(), [torch.float32])


def test_several_python_threads_at_once() -> None:
    cases = [
        case([(2, 40, "per_token", 4)], (2, 24, "per_token", 4), n, 4, torch.float32)
        for n in (300, 400, 500, 600)
    ]
    with ThreadPoolExecutor(4) as pool:
        for given, found in zip(
            cases, pool.map(lambda given: decode(*given, None, SCALE), cases), strict=True
        ):
            assert error(found, attended(*given, None, SCALE)) < 4e-6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_it_to_others() -> None:
    """Numba ends a process that is forked after its threads were started and uses them again."""
    code = """
import os, torch
from vdcompress.modeling import numba_compiled, numba_decode as own
own.WORTH = own.WORTH_PACKED = 0
query, x = torch.zeros(1, 4, 1, 40), torch.zeros(1, 4, 2000, 40)
pid = os.fork()
if not pid:  # nothing was entered yet
    os._exit(own.attend_exact(query, x, x, None, 1.0) is None)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert own.attend_exact(query, x, x, None, 1.0) is not None
pid = os.fork()
if not pid:
    os._exit(own.attend_exact(query, x, x, None, 1.0) is not None)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_torch_keeps_its_threads_when_numba_starts_its_own() -> None:
    """As many as processors they would be, and small operations wait for each other."""
    code = """
import torch
from vdcompress.modeling import numba_compiled, numba_decode as own
own.WORTH = own.WORTH_PACKED = 0
query, x = torch.zeros(1, 4, 1, 40), torch.zeros(1, 4, 2000, 40)
for threads in (1, 3):
    torch.set_num_threads(threads)
    own.attend_exact(query, x, x, None, 1.0)
    assert torch.get_num_threads() == threads
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_numba_attention_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (drawn(1, 4, s, 40, seed=s, dtype=torch.float32) for s in (1, 90, 91))
    value = value[:, :, :90]
    module = nn.Module().eval()
    found, _ = latent_attention(module, query, key, value, None, SCALE)
    monkeypatch.setitem(sys.modules, "vdcompress.modeling.numba_decode", None)
    plain, _ = latent_attention(module, query, key, value, None, SCALE)
    assert error(found, plain.double()) < 4e-6
    assert not torch.equal(found, plain)  # made in another way


@pytest.fixture(scope="module", params=["exact", "packed", "packed by channel"])
def model(request: Any, base: Base, statistics: Statistics) -> Any:
    widths = {"v_dim": 16} if request.param == "exact" else {}
    bits = {} if request.param == "exact" else {"v_bits": 8, "k_bits": 8}
    plan = make_plan(base.shape, **widths, **bits)
    if request.param == "packed by channel":
        layers = (
            replace(layer, k_nope=replace(layer.k_nope, quantizer="per_channel"))
            if layer.k_nope.packed
            else layer
            for layer in plan.layers
        )
        plan = replace(plan, layers=tuple(layers), sinks=2, window=3)
    return rewrite(base, plan, statistics)


@pytest.mark.parametrize("way", ["greedy", "beams", "sampled", "left padding", "continued"])
def test_a_model_generates_the_same(
    model: Any, way: str, token_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(*given: Any) -> Tensor:
        seen.append(1)
        return decode(*given)

    def generated(worth: float) -> Tensor:
        monkeypatch.setattr(numba_decode, "WORTH", worth)
        monkeypatch.setattr(numba_decode, "WORTH_PACKED", worth)
        torch.manual_seed(0)
        ids = token_windows[:3, :50]
        mask = torch.ones_like(ids)
        if way == "left padding":
            mask[0, :20] = 0
        settings: dict[str, Any] = {"num_beams": 3} if way == "beams" else {}
        settings |= {"do_sample": way == "sampled", "max_new_tokens": 12, "pad_token_id": 0}
        settings |= {"eos_token_id": None, "return_dict_in_generate": True}
        found = model.generate(ids, attention_mask=mask, **settings)
        if way == "continued":
            cache = found["cache"] if "cache" in found else found["past_key_values"]
            cache.crop(55 - cache.get_seq_length())
            with torch.no_grad():
                return model(found.sequences[:, 55:56], past_key_values=cache).logits
        return found.sequences

    plain = generated(math.inf)
    assert not seen
    monkeypatch.setattr(numba_decode, "decode", counted)
    found = generated(0)
    assert seen
    torch.testing.assert_close(found, plain, atol=2e-3, rtol=0)
