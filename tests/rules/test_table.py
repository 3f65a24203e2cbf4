from __future__ import annotations

import pytest

from gradalign import rules


def test_names_are_sorted_and_each_makes_its_rule():
    assert rules.names() == [
        "agem", "aligned-mtl", "anchored-pcgrad", "attittud", "bloop", "cagrad", "config", "constant", "cosine-gate",
        "dual-proj", "excess-mtl", "fairgrad", "ga-hard", "ga-soft", "gem", "graddrop", "gradvac", "imtl-g", "krum",
        "mean", "mgda", "moco", "modo", "momentum-weights", "nash-mtl", "olaux", "pcd", "pcgrad", "random-weights",
        "sdmgrad", "sum", "trimmed-mean", "upgrad",
    ]  # fmt: skip
    assert isinstance(rules.get("ga-hard"), rules.GAHard)
    assert rules.get("ga-soft", alpha=0.1, anchor="ce").alpha == 0.1
    assert rules.get("constant", weights=[1, 2]).weights == (1.0, 2.0)


def test_an_unknown_name_offers_near_ones():
    with pytest.raises(ValueError, match=r"`rule` must be one of .*, got 'pc-grad'; did you mean 'pcgrad'"):
        rules.get("pc-grad")
    with pytest.raises(ValueError, match=r"got 'GA_soft'; did you mean 'ga-soft'"):
        rules.get("GA_soft")
    with pytest.raises(ValueError, match=r"`rule` must be one of .*, got \['pcgrad'\]"):
        rules.get(["pcgrad"])
    with pytest.raises(ValueError, match=r"got 'zzzzzz'\.$"):
        rules.get("zzzzzz")


def test_hyper_parameters_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match=r"`ga-soft` must be given hyper-parameters it has .*alpha.*got 'alhpa'"):
        rules.get("ga-soft", alhpa=0.1)
    with pytest.raises(TypeError, match=r"`constant` must be given weights, got nothing"):
        rules.get("constant")
