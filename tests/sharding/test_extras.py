"""Vision towers and MTP layers: parameters as an independent implementation of the models counts them."""

import pytest
from published_models import CONFIGS, model

from shardwise.sharding.document import extras
from shardwise.sharding.plan import plan
from shardwise.sharding.report import text_report

# Elements of the vision part when Transformers builds the published config.
VISION = {
    "Qwen/Qwen3-VL-235B-A22B-Instruct": 576_388_336,
    "Qwen/Qwen3-VL-2B-Instruct": 406_957_056,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": 538_631_408,
    "Qwen/Qwen3-VL-32B-Thinking": 595_266_800,
    "Qwen/Qwen3-VL-4B-Instruct": 415_347_712,
    "Qwen/Qwen3.5-27B": 460_730_096,
    "Qwen/Qwen3.5-35B-A3B": 446_571_248,
    "nvidia/Qwen3.5-122B-A10B-NVFP4": 451_290_864,
    "nvidia/MiniMax-M3-NVFP4": 865_567_232,
    "google/gemma-4-26B-A4B": 572_792_112,
}


def extra(name, part):
    return next(row for row in extras(plan(model(name))) if row["name"] == part)


@pytest.mark.parametrize("name", VISION)
def test_vision_towers(name):
    row = extra(name, "vision")
    assert row["parameters"] == VISION[name]
    assert row["bytes"] == 2 * VISION[name] and not row["loaded"]


def test_the_mtp_layer_is_what_separates_the_published_total_from_the_decoder():
    # 81.325 B in the published index, 79.674 B in the decoder.
    row = extra("Qwen/Qwen3-Next-80B-A3B-Instruct", "mtp")
    decoder = plan(model("Qwen/Qwen3-Next-80B-A3B-Instruct")).parameters
    assert (decoder + row["parameters"]) / 1e9 == pytest.approx(81.325, abs=0.001)


# Totals of the published checkpoints, scales left out.
WITH_MTP = {
    "deepseek-ai/DeepSeek-V3": 684_489_845_504,
    "zai-org/GLM-4.5": 358_337_791_296,
    "zai-org/GLM-4.5-Air": 110_468_824_832,
    "zai-org/GLM-5": 753_864_139_008,
    "XiaomiMiMo/MiMo-7B-Base": 7_833_409_536,
}


@pytest.mark.parametrize("name", WITH_MTP)
def test_decoder_and_mtp_layers_make_up_the_published_total(name):
    planned = plan(CONFIGS[name] | {"num_nextn_predict_layers": 1})  # which the GLM-4.5 configs here leave out
    (row,) = extras(planned)
    assert planned.parameters + row["parameters"] == WITH_MTP[name]


ANNOUNCE_MTP = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers")


def test_every_announced_mtp_layer_is_listed():
    announced = [
        name
        for name, config in CONFIGS.items()
        if any(section.get(field) for section in (config, config.get("text_config") or {}) for field in ANNOUNCE_MTP)
    ]
    assert len(announced) > 25
    for name in announced:
        assert extra(name, "mtp")


def test_the_mtp_layer_of_deepseek_v4_is_a_whole_decoder_layer_and_two_projections():
    name = "deepseek-ai/DeepSeek-V4-Flash"
    config = CONFIGS[name]
    longer = config | {"num_hidden_layers": 44, "num_nextn_predict_layers": 0}  # compress_ratios names 44 layers
    last = plan(longer).parameters - plan(model(name)).parameters
    hidden, streams = config["hidden_size"], config["hc_mult"]
    own = 2 * hidden**2 + 3 * hidden + streams**2 * hidden + streams + 1
    assert extra(name, "mtp")["parameters"] == last + own
    assert (
        plan(model(name), tp=8, ep=8, extras=["mtp"]).ranks[0].tensors > plan(model(name), tp=8, ep=8).ranks[0].tensors
    )


def test_mtp_layers_that_are_not_described_are_listed_without_bytes():
    row = extra("stepfun-ai/Step-3.7-Flash", "mtp")
    assert row["bytes"] is None and row["note"].startswith("3 layers")


def test_a_tower_that_is_not_described_is_listed_without_bytes_and_cannot_be_loaded():
    row = extra("moonshotai/Kimi-K3", "vision")
    assert row["bytes"] is None and "headers" in row["note"]
    assert "vision, of unknown size" in text_report(plan(model("moonshotai/Kimi-K3")))
    with pytest.raises(ValueError, match="the model has no 'vision'"):
        plan(model("moonshotai/Kimi-K3"), extras=["vision"])


GEMMA3_VISION = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
GEMMA3_TEXT = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
LLAMA4_VISION = {
    "hidden_size": 1408,
    "image_size": 336,
    "intermediate_size": 5632,
    "model_type": "llama4_vision_model",
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
}
SCOUT = CONFIGS["meta-llama/Llama-4-Scout-17B-16E-Instruct"]


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "torch_dtype": "bfloat16",
                "text_config": GEMMA3_TEXT,
                "vision_config": GEMMA3_VISION,
            },
            4_300_079_472,
        ),
        (SCOUT | {"vision_config": LLAMA4_VISION}, 108_641_793_536),
    ],
    ids=["gemma-3-4b", "llama-4-scout"],
)
def test_decoder_and_tower_make_up_the_published_total(config, total):
    planned = plan(config)
    (tower,) = extras(planned)
    assert planned.parameters + tower["parameters"] == total


def test_every_announced_tower_is_listed():
    announced = [name for name, config in CONFIGS.items() if config.get("vision_config")]
    assert len(announced) > 15
    for name in announced:
        assert extra(name, "vision")


def test_loading_an_extra_adds_exactly_its_bytes():
    name = "Qwen/Qwen3-VL-2B-Instruct"
    lean, rich = plan(model(name), tp=2), plan(model(name), tp=2, extras=["vision"])
    more = {b.weight_bytes - a.weight_bytes for a, b in zip(lean.ranks, rich.ranks, strict=True)}
    assert more == {2 * VISION[name]}
    assert extras(rich)[0]["loaded"]
