"""Recipes, overrides, and every error at once in sentences."""

import pickle
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from pydantic import ValidationError

from raymuse.config.base import Config
from raymuse.config.describe import describe
from raymuse.config.errors import ConfigError, TooManyRejects, UserError
from raymuse.config.flow import FlowConfig
from raymuse.config.load import from_values, load, recipes_for
from raymuse.config.reading import parse, parse_value
from raymuse.config.recipe import SECTIONS, read, recipe_text, recipes, stage_of
from raymuse.config.sampling import GuidanceSchedule, MaskingSchedule, Options, SamplingConfig
from raymuse.config.score import SideConfig, SweepConfig
from raymuse.config.stages import STAGES
from raymuse.config.training import BaseConfig
from raymuse.masking import GUIDANCE_SCHEDULES, SCHEDULES
from raymuse.serving.protocol import ImagesRequest
from raymuse.storage.prompts import Asked


def write(folder: Path, text: str, name: str = "my.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def problems(recipe: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(recipe, overrides)
    return caught.value.problems


@pytest.mark.parametrize("name", [name for name, _ in recipes()])
def test_every_shipped_recipe_and_section_loads(name: str) -> None:
    flow = load(name)
    if not isinstance(flow, FlowConfig):
        assert name in recipes_for([stage_of(type(flow))])
        return
    for section, model in SECTIONS.items():
        config = load(f"{name}:{section}")
        assert type(config) is model
        assert config == getattr(flow, section).within(flow.workdir)


def test_recipes_say_what_they_are() -> None:
    assert recipes()[0][0] == "demo"
    assert all(comment for _, comment in recipes())


TUNED = [f"{kind}-{side}" for kind in ("finetune", "finetune-8bit", "lora", "styledrop") for side in (256, 512)]
BASES = ["base-256", "base-512", "muse-3b", "muse-632m"]
VQGANS = ["vqgan-decoder", "vqgan-f16", "vqgan-f8"]


@pytest.mark.parametrize(
    ("stages", "shipped"),
    [
        (("pretokenize",), ["tokens-256", "tokens-512", "tokens-superres-512"]),
        (("train-vqgan",), VQGANS),
        (
            ("train-clip", "train-base", "train-superres", "train-critic"),
            sorted(["critic", "pokemon-blip-512", "stream-256", "superres-512", *TUNED, *BASES]),
        ),
        (("export",), ["export-256", "export-512"]),
        (("score",), ["cc3m", "coco-30k"]),
        (("score", "sweep", "compare"), ["cc3m", "coco-30k", "sweep"]),
        (("generate",), ["cc3m-draw", "coco-30k-draw"]),
    ],
)
def test_what_is_offered_for_stages_loads_as_one_of_them(stages: tuple[str, ...], shipped: list[str]) -> None:
    offered = recipes_for(stages)
    assert offered[0].startswith("demo:")
    for recipe in offered:
        load(recipe, stage=stages)
    own = [recipe for recipe in offered if ":" not in recipe]
    assert own == shipped


def test_extends_merges_sections_and_model_dicts_deeply() -> None:
    smoke, demo = load("smoke"), load("demo")
    assert isinstance(smoke, FlowConfig)
    assert isinstance(demo, FlowConfig)
    assert smoke.vqgan.model["layers_per_block"] == demo.vqgan.model["layers_per_block"]
    assert smoke.vqgan.model["block_out_channels"] == [8, 16, 16]
    assert smoke.base.optimizer == demo.base.optimizer
    assert smoke.base.steps != demo.base.steps


def test_a_file_extends_a_section_and_another_file(tmp_path: Path) -> None:
    write(tmp_path, "stage: train-base\nextends: demo:base\nsteps: 7\n", "first.yaml")
    config = load(write(tmp_path, "extends: first.yaml\noutput: elsewhere\n"))
    assert isinstance(config, BaseConfig)
    assert (config.steps, config.output, config.input) == (7, "elsewhere", "runs/demo/tokens")


def test_a_section_lies_in_the_workdir_and_overrides_where_the_user_stands() -> None:
    config = load("demo:base", ["workdir=/big/run", "input=tokens", "start_from=s3://bucket/model"])
    assert isinstance(config, BaseConfig)
    assert config.output == "/big/run/base"
    assert config.text_encoder == "/big/run/clip/model"
    assert config.input == "tokens"
    assert config.start_from == "s3://bucket/model"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 1e-3), (".5", 0.5), ("2000", 2000), ("010", 10), ("", ""), ("null", None), ("true", True)],
        *[("no", "no"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("a red star", "a red star")],
        ("[1, x]", [1, "x"]),
    ],
)
def test_values_are_what_they_look_like(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_overrides_reach_every_depth() -> None:
    config = load("demo:base", ["optimizer.lr=1e-4", "model.hidden_size=64", "gradient_checkpointing=on", "seed=3"])
    assert isinstance(config, BaseConfig)
    assert (config.optimizer.lr, config.seed, config.gradient_checkpointing) == (1e-4, 3, True)
    assert config.model["hidden_size"] == 64
    assert config.model["num_hidden_layers"] == 1


def test_configs_know_the_schedules_by_name() -> None:
    assert set(get_args(MaskingSchedule)) == set(SCHEDULES)
    assert set(get_args(GuidanceSchedule)) == set(GUIDANCE_SCHEDULES)


def test_an_option_of_sampling_is_one_everywhere() -> None:
    options = {name: field.annotation for name, field in SamplingConfig.model_fields.items()}
    assert get_type_hints(Options) == options
    assert list(options) == [name for name in SideConfig.model_fields if name in options]
    assert list(options) == [name for name in SweepConfig.model_fields if name in options]
    apart = {"guidance_span", "guidance_every", "masked_only"}  # a row says `guidance_from`, `guidance_to`
    for kind, own in ((Asked, apart), (ImagesRequest, {*apart, "steps", "guidance"})):
        assert options.keys() & kind.model_fields.keys() == options.keys() - own
        assert (kind.__module__, pickle.loads(pickle.dumps(kind))) == (kind.__bases__[0].__module__, kind)
    with pytest.raises(ValidationError, match="top_p"):
        Asked(top_p=1.5)


def test_all_errors_are_said_at_once_with_place_and_suggestion(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "extends: smoke\n"
        "bass: {steps: 3}\n"
        "base:\n"
        "  setps: 4\n"
        "  steps: many\n"
        "  optimizer: {lr: -1, schedule: cosin}\n"
        "data:\n"
        "name: 12\n",
    )
    found = problems(path, "oops", "lr=1", "vqgan.ema_decay=None", "score.judge=shape")
    assert found == [
        "'oops' is no override: write KEY=VALUE, like base.steps=2000",
        f"name: must be text, was 12 (a whole number); quote it to make it text: '\"12\"' ({path} line 8)",
        f"data: must be a section (its own `key: value` lines), was nothing ({path} line 7)",
        "vqgan.ema_decay: must be a number, was 'None'; nothing at all is written `null` "
        "(given as vqgan.ema_decay=None)",
        f"base.steps: must be a whole number, was 'many' ({path} line 5)",
        f"base.optimizer.lr: must be above 0.0, was -1 ({path} line 6)",
        "base.optimizer.schedule: must be 'constant', 'cosine' or 'linear'; was 'cosin'; did you mean cosine? "
        f"({path} line 6)",
        f"base.setps: no such key; did you mean base.steps? ({path} line 4)",
        "score.judge: must be 'auto', 'shapes' or 'none'; was 'shape'; did you mean shapes? "
        "(given as score.judge=shape)",
        f"bass: no such key; did you mean base? ({path} line 2)",
        "lr: no such key; did you mean vqgan.optimizer.lr, vqgan.adversarial.lr, clip.optimizer.lr, "
        "base.optimizer.lr or superres.optimizer.lr? (given as lr=1)",
    ]


def test_missing_keys_say_what_they_want(tmp_path: Path) -> None:
    found = problems(write(tmp_path, "stage: train-base\n"))
    assert found == [
        "output: missing (folder that this stage writes)",
        "steps: missing",
        "input: missing (token shards)",
    ]


def test_rules_between_fields_are_sentences() -> None:
    (problem,) = problems("demo", "pretokenize.low_resolution=64")
    sentence, line = re.fullmatch(r"(.*) \(demo\.yaml line (\d+)\)", problem).groups()  # type: ignore[union-attr]
    assert sentence == "pretokenize: low_resolution=64 must be below resolution=64"
    assert recipe_text("demo").splitlines()[int(line) - 1] == "pretokenize:"


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: demo\nbase: {steps: 3}\nbase: {steps: 4}\n")
    assert problems(path) == [f"base: given twice ({path} lines 2 and 3): keep one"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not YAML: .* line 1"),
        ("\ta: 1", "indent with spaces"),
        ("- 1", "must be lines of"),
        ("a: &x {b: *x}", "within its own anchor"),
        ("a: !!python/name:os.system x", "not YAML"),
        ("name: x", "stage: missing"),
        ("stage: train-bse", "did you mean train-base"),
        ("extends: [demo]", "must be the name or path of one recipe"),
        ("extends: dmeo", "no recipe 'dmeo'; did you mean demo.* line 1"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(write(tmp_path, text))


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("dmeo", "did you mean demo"),
        ("demo:bse", "Did you mean demo:base"),
        ("nowhere/my.yaml", "there is no file nowhere/my.yaml"),
    ],
)
def test_recipes_that_do_not_exist(recipe: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(recipe)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("demo:base", "config of train-base: run it with `raymuse train demo:base`"),
        ("demo", "whole flow: run it with `raymuse demo --recipe demo`.* this command takes demo:pretokenize"),
    ],
)
def test_the_wrong_command_is_told_the_right_one(recipe: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(recipe, stage="pretokenize")


def test_an_override_cannot_lead_through_a_value() -> None:
    assert problems("demo", "name.first=2") == ["name.first: name is a value, not a section"]


def test_values_without_a_recipe() -> None:
    assert from_values("serve", {"model": "m"}, ["port=8001"]).model_dump()["port"] == 8001
    with pytest.raises(ConfigError, match="port: must be at most 65535, was 70000"):
        from_values("serve", {"model": "m"}, ["port=70000"])


@pytest.mark.parametrize("stage", STAGES)
def test_descriptions_name_every_key(stage: str) -> None:
    text = describe(STAGES[stage])
    assert all(f"{name}:" in text for name in STAGES[stage].model_fields)


def test_a_described_config_loads_again_as_it_was() -> None:
    config = load("smoke", ["superres.micro_batch_size=4", "generate.negative='a: b'"])
    assert FlowConfig.model_validate(parse(describe(config), "described").values) == config


def test_within_moves_optional_addresses_too() -> None:
    config = read("demo:base").values
    assert config["vqgan"] == "runs/demo/vqgan/model"


def test_recipe_text_is_the_file() -> None:
    assert parse(recipe_text("demo"), "demo").values["stage"] == "flow"


def test_errors_survive_the_way_out_of_another_process() -> None:
    for error in (ConfigError("x", ["a", "b"]), TooManyRejects(3, 10, "out/rejects")):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), vars(again)) == (str(error), vars(error))


def test_configs_are_frozen() -> None:
    config: Config = load("demo:base")
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[attr-defined]
