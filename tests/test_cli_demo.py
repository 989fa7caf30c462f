"""The demo does the whole job."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Vdcompress


@pytest.mark.slow
def test_the_demo_ends_with_a_better_model_and_its_text(vdcompress: Vdcompress) -> None:
    ended = vdcompress("demo", "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    perplexity = found["perplexity"]
    assert perplexity["base"] < perplexity["compressed"] < 1.03 * perplexity["base"]
    assert perplexity["healed"] < perplexity["compressed"]
    assert found["kv_cache"]["reduction"] == 0.1875
    assert found["export"]["text"].startswith("The")
    assert Path("vdcompress-demo/export/README.md").is_file()
