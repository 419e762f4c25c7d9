"""The figures of sets of pictures, held against torch-fidelity's on the same features, weights and pictures."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fidelity_reference
from raymuse.config.errors import UserError
from raymuse.config.score import MeasuresConfig
from raymuse.models.inception import Inception, inception_sha256
from raymuse.scoring.collected import Collected, total
from raymuse.scoring.distances import codebook_usage, inception_score, kernel_distance, precision_recall
from raymuse.scoring.frechet import Moments, frechet_distance, pack, unpack
from raymuse.scoring.paired import compare
from raymuse.scoring.reference import CROP, Reference, check_reference, read_statistics
from raymuse.scoring.summary import set_figures

REFERENCE = json.loads((Path(__file__).parent / "fidelity_reference.json").read_text())


# --- torch-fidelity's numbers


def test_fid_kid_precision_recall_and_inception_score_are_torch_fidelitys() -> None:
    drawn, real, logits = fidelity_reference.features()
    assert frechet_distance(Moments.of(drawn), Moments.of(real)) == pytest.approx(REFERENCE["fid"], abs=1e-4)
    assert kernel_distance(drawn[:300], real).mean == pytest.approx(REFERENCE["kid_300"], abs=1e-4)
    assert kernel_distance(drawn[:300], real).deviation == 0  # all of both: one subset
    assert precision_recall(drawn, real) == pytest.approx((REFERENCE["precision"], REFERENCE["recall"]), abs=1e-4)
    score = inception_score(logits)
    assert score.mean == pytest.approx(REFERENCE["inception_score_mean"], abs=1e-4)
    assert score.deviation == pytest.approx(REFERENCE["inception_score_std"], abs=1e-4)


def test_kid_of_random_subsets_is_theirs_but_for_which_subsets_are_drawn() -> None:
    drawn, real, _ = fidelity_reference.features()
    kid = kernel_distance(drawn, real, subsets=100, subset_size=100)
    between = REFERENCE["kid_std_100"] / 100**0.5
    assert kid.mean == pytest.approx(REFERENCE["kid_100"], abs=4 * 2**0.5 * between)
    assert kid.deviation == pytest.approx(REFERENCE["kid_std_100"], rel=0.3)
    assert kernel_distance(drawn, real, subsets=100, subset_size=100) == kid


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of FID's Inception, as torch.save writes them."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(fidelity_reference.inception_state(), path)
    return path


def test_the_network_sees_what_torch_fidelitys_sees(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "same.safetensors")
    one, other = Inception.load(str(weights)), Inception.load(str(tmp_path / "same.safetensors"))
    for side, pixels in fidelity_reference.pictures().items():
        seen = one.see(pixels)
        wanted = {name: np.array(REFERENCE["network"][f"{name}_{side}"]) for name in ("features", "logits")}
        np.testing.assert_allclose(seen.features[0, ::128], wanted["features"], atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(seen.logits[0, ::63], wanted["logits"], atol=2e-4, rtol=1e-4)
        means = REFERENCE["network"][f"features_mean_{side}"]
        np.testing.assert_allclose(seen.features.mean(axis=1), means, rtol=1e-4)
    np.testing.assert_array_equal(other.see(pixels[:1]).features, one.see(pixels[:1]).features)


def test_weights_that_are_missing_or_anothers_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is no file on this machine\. .*not downloaded: fetch pt_inception-2015-12-05"
    ):
        inception_sha256(str(tmp_path / "none.pth"))
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvisions.pth")
    with pytest.raises(UserError, match=r"fc.weight is \[1000, 2048\], not \[1008, 2048\]: it is not FID's Inception"):
        Inception.load(str(tmp_path / "torchvisions.pth"))
    torch.save({"fc.weight": weights}, tmp_path / "code.pth")  # a path is a pickled object
    with pytest.raises(UserError, match="cannot be read as weights"):
        Inception.load(str(tmp_path / "code.pth"))


# --- sums of parts


def test_the_frechet_distance_is_that_of_the_formula_and_of_parts_added_up() -> None:
    draw = np.random.default_rng(0)
    one = draw.normal(0, 1, (4000, 3)) * [1, 2, 3]
    other = draw.normal(0, 1, (3000, 3)) * [2, 2, 1] + [1, 0, -2]
    sums = [Moments.of(one), Moments.of(other)]
    means, spreads = [x.mean(axis=0) for x in (one, other)], [np.cov(x.T) for x in (one, other)]
    for found, mean, spread in zip(sums, means, spreads, strict=True):
        np.testing.assert_allclose(found.mean, mean)
        np.testing.assert_allclose(found.covariance, spread)
    assert frechet_distance(*sums) == pytest.approx(1 + 4 + (1 + 0 + 4), rel=0.1)  # diagonal: (s1 - s2)^2 each
    assert frechet_distance(*sums) == pytest.approx(frechet_distance(*sums[::-1]))
    assert frechet_distance(sums[0], sums[0]) == pytest.approx(0, abs=1e-6)
    parts = unpack(pack({"a": Moments.of(one[:1000]), "b": Moments.of(one[1000:])}))
    assert frechet_distance(parts["a"] + parts["b"], sums[0]) == pytest.approx(0, abs=1e-6)
    assert unpack(pack({})) == {}


def test_what_parts_say_adds_up_to_what_the_whole_says() -> None:
    drawn, _, logits = fidelity_reference.features()
    whole = {"base/inception": drawn, "base/logits": logits, "base/codes": np.arange(8)}
    pieces = [
        Collected.of({"base/inception": drawn[a:b], "base/logits": logits[a:b], "base/codes": codes}, 150)
        for a, b, codes in ((0, 100, np.arange(8) // 2), (100, 400, np.arange(8) - np.arange(8) // 2))
    ]
    added = total((Collected.unpacked(piece.packed()) for piece in pieces), 150).named("base")
    expected = Collected.of(whole, 150).named("base")
    np.testing.assert_allclose(added.moments["inception"].products, expected.moments["inception"].products)
    assert added.moments["inception"].count == 400
    np.testing.assert_array_equal(added.kept["inception"], drawn[:150])
    np.testing.assert_array_equal(added.kept["logits"], logits)
    np.testing.assert_array_equal(added.codes["codes"], np.arange(8))


def test_the_codebooks_use_is_its_share_and_perplexity() -> None:
    assert asdict(codebook_usage(np.array([5, 5, 0, 0]))) == {"share": 0.5, "perplexity": pytest.approx(2)}
    assert codebook_usage(np.array([4, 2, 2])).perplexity == pytest.approx(np.exp(1.5 * np.log(2)))


# --- statistics of real pictures


def made_of(**changes: object) -> dict[str, object]:
    facts = {"inception": {"weights": "abc", "preprocessing": "p"}}
    return {"extractors": facts, "side": 64, "crop": CROP, "pictures": "f00", **changes}


def test_statistics_come_back_and_what_made_them_is_held_against_what_is_wanted(tmp_path: Path) -> None:
    drawn, real, _ = fidelity_reference.features()
    reference = Reference.of(Collected.of({"real/inception": real}, 300).named("real"), made_of())
    (tmp_path / "coco.safetensors").write_bytes(reference.to_bytes())
    address = str(tmp_path / "coco.safetensors")
    read = read_statistics(address, trust=False)
    assert read.made_of == {**made_of(), "count": 300}
    figures = set_figures(Collected.of({"x/inception": drawn}, 400).named("x"), read, MeasuresConfig())
    assert figures["fid"] == pytest.approx(REFERENCE["fid"], abs=1e-4)
    assert figures["precision"] == pytest.approx(REFERENCE["precision"], abs=1e-4)
    check_reference(address, read, made_of())
    check_reference(address, read, made_of(pictures=None))
    for changes, said in (
        ({"side": 256}, r"coco.safetensors was made with something else: side was 64 and is now 256\. Name another"),
        ({"pictures": "bar"}, r"pictures was 'f00' and is now 'bar'"),
        (
            {"extractors": {"inception": {"weights": "abc", "preprocessing": "q"}}},
            r"extractors.inception.preprocessing",
        ),
        ({"extractors": {"clip": {"weights": "abc"}}}, r"has no features of clip"),
    ):
        with pytest.raises(UserError, match=said):
            check_reference(address, read, made_of(**changes))


def test_mu_and_sigma_count_only_where_they_are_trusted(tmp_path: Path) -> None:
    drawn, real, _ = fidelity_reference.features()
    address = str(tmp_path / "fid_stats.npz")
    np.savez(address, mu=real.mean(axis=0), sigma=np.cov(real.T))
    with pytest.raises(UserError, match="does not say which network and preprocessing made it"):
        read_statistics(address, trust=False)
    read = read_statistics(address, trust=True)
    check_reference(address, read, made_of(side=17))
    figures = set_figures(Collected.of({"x/inception": drawn}, 400).named("x"), read, MeasuresConfig())
    assert figures == {"fid": pytest.approx(REFERENCE["fid"], abs=1e-4)}  # of no features there is no KID
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}]), sigma=np.array([[1]]))
    for name, said in (
        ("broken.safetensors", "cannot be read as statistics"),
        ("pickled.npz", "cannot be read as a .npz with mu and sigma: Object arrays"),
        ("none.npz", r"do not exist\. Give reference=PICTURES"),
    ):
        with pytest.raises(UserError, match=said):
            read_statistics(str(tmp_path / name), trust=True)


# --- pairs


def test_pairs_say_who_is_better_and_how_surely() -> None:
    rng = np.random.default_rng(3)
    base, prompts = rng.normal(0.3, 0.05, 400), list(range(200)) * 2
    better = compare(base + 0.01 + rng.normal(0, 0.02, 400), base, prompts, 0.95, 2000)
    assert better.better == "a"
    assert better.difference.low < 0.01 < better.difference.high
    assert better.difference.high - better.difference.low == pytest.approx(2 * 1.96 * 0.02 / 400**0.5, rel=0.2)
    assert (better.pairs, better.prompts, better.ties) == (400, 200, 0)
    assert better.p_value < 1e-3
    assert better.share_a.low > 0.5
    worse = compare(base, base + 0.01, prompts, 0.95, 2000)
    assert worse.better == "b"
    assert (worse.wins_a, worse.wins_b) == (0, 400)
    same = compare(base, base, prompts, 0.95, 2000)
    assert (same.better, same.ties, same.p_value, same.share_a.value) == (None, 400, 1.0, 0.5)


def test_an_interval_holds_the_truth_as_often_as_it_says_also_where_prompts_have_several_pictures() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(300):
        by_prompt = rng.normal(0.0, 1.0, 40).repeat(5)  # five pictures a prompt, that mostly agree
        a = by_prompt + rng.normal(0, 0.3, 200)
        interval = compare(a, np.zeros(200), np.arange(40).repeat(5).tolist(), 0.9, 300).difference
        held += interval.low <= 0 <= interval.high
    assert 0.82 < held / 300 < 0.95  # the bootstrap of 40 prompts is a little too sure of itself


def test_right_and_wrong_are_compared_by_mcnemars_exact_test() -> None:
    a = np.array([1.0] * 9 + [0.0] + [1.0] * 20)
    b = np.array([0.0] * 9 + [1.0] + [1.0] * 20)
    found = compare(a, b, list(range(30)), 0.95, 500)
    assert (found.wins_a, found.wins_b, found.ties) == (9, 1, 20)
    assert found.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert (found.mean_a, found.mean_b) == (pytest.approx(29 / 30), pytest.approx(21 / 30))
