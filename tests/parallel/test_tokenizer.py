import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from shardwise.parallel.chat import render_chat
from shardwise.parallel.tokenizer import load_tokenizer
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.resolve import Checkpoint, open_checkpoint

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&</b> 你好"}]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return load_tokenizer(open_checkpoint(smollm2_path))


def texts() -> list[str]:
    choice = random.Random(0).choice
    letters = "abC Zé你🙂.,;'\"\n\t_-(){}ßđ"
    made = ["".join(choice(letters) for _ in range(60)) for _ in range(400)]
    fixed = [
        "",
        " ",
        "In 2024, 12345 apples cost $1,000.50.",
        "don't WE'LL I've it's",
        "  leading and   inner   spaces  ",
        "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
        "def f(x):\n    return x**2  # naïve\n\n\n",
        "日本語のテキスト ✓ 👩‍👩‍👧",
    ]
    return fixed + made


def test_ids_equal_those_of_transformers_for_the_same_file(tokenizer, transformers_tokenizer):
    for text in texts():
        assert tokenizer.encode(text) == transformers_tokenizer.encode(text, add_special_tokens=False), repr(text)


def test_digits_stand_alone_as_the_named_pretokenizer_says(tokenizer):
    # "smollm" splits digits off before words are formed; Transformers forms words first and gets " ", " ", "5".
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a  57")] == ["a", "  ", "5", "7"]


def test_the_chat_prompt_equals_transformers(tokenizer, transformers_tokenizer):
    expected = transformers_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    assert tokenizer.encode_chat(CHAT) == list(expected["input_ids"])


def test_special_ids_come_from_the_metadata(tokenizer):
    assert tokenizer.bos_id == 1
    assert tokenizer.stop_ids == (2,)


def test_streamed_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer):
    for text in texts():
        ids = tokenizer.encode(text)
        push = tokenizer.stream()
        pieces = [push(i) for i in ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == tokenizer.decode(ids)


@pytest.fixture
def folder(tmp_path):
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<end>": 4}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def load(folder, config=None):
    return load_tokenizer(Checkpoint("folder", folder, config or {}))


def test_a_folder_gives_special_tokens_and_template(folder):
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ bos_token }}ab"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 3]}))
    tokenizer = load(folder, {"eos_token_id": 1})
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (2, (4, 3))
    assert tokenizer.encode_chat(CHAT) == [2, 0, 1]
    (folder / "chat_template.jinja").write_text("ba")
    assert load(folder).encode_chat(CHAT) == [1, 0]


def test_stop_ids_come_from_the_config_where_nothing_else_names_them(folder):
    assert load(folder, {"eos_token_id": 1}).stop_ids == (1,)
    assert load(folder).stop_ids == ()


def test_a_model_without_template_says_what_to_do(folder):
    with pytest.raises(ValueError, match="no chat template.*--raw"):
        load(folder).encode_chat(CHAT)


def test_a_tokenizer_that_cannot_be_read_is_named_by_its_file(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json: the tokenizers library cannot read it: EOF"):
        load(folder)


def test_broken_settings_of_a_tokenizer_are_named_by_their_file(folder):
    (folder / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(ValueError, match="tokenizer_config.json: not valid JSON"):
        load(folder)


@pytest.mark.parametrize(
    "file, content, text",
    [
        ("tokenizer_config.json", {"bos_token": 5}, "tokenizer_config.json: bos_token is 5, expected a text"),
        ("tokenizer_config.json", {"eos_token": {"content": []}}, "eos_token is {'content': ..}, expected a text"),
        ("tokenizer_config.json", {"chat_template": 5}, "tokenizer_config.json: chat_template is 5, expected a text"),
        ("generation_config.json", {"eos_token_id": ["a"]}, "generation_config.json: eos_token_id is .'a'., expected"),
        ("config.json", {"eos_token_id": "a"}, "config.json: eos_token_id is 'a', expected a token id or a list"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: is not UTF-8 text: invalid start byte at byte 0"),
    ],
)
def test_settings_of_a_wrong_type_are_named_by_file_and_field(folder, file, content, text):
    (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(CheckpointError, match=text):
        load(folder, content if file == "config.json" else None)


@pytest.mark.parametrize(
    "templates, found",
    [
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "ab"}], "ab"),
        ([{"name": "default"}], None),
    ],
)
def test_of_several_templates_the_default_one_counts(folder, templates, found):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert load(folder).chat_template == found


def test_a_gguf_file_whose_tokens_do_not_fit_together_is_named():
    meta = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1]}
    checkpoint = Checkpoint("x", Path("x.gguf"), {}, SimpleNamespace(path=Path("x.gguf"), metadata=meta))
    with pytest.raises(CheckpointError, match="x.gguf: tokenizer.ggml.* make no tokenizer: "):
        load_tokenizer(checkpoint)


def test_a_folder_with_another_kind_of_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        load(tmp_path)


def test_a_folder_without_any_tokenizer_takes_ids_and_stops_at_its_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None, "text_config": {"eos_token_id": [0, 5]}}))
    tokenizer = load_tokenizer(open_checkpoint(tmp_path))
    assert tokenizer.stop_ids == (0, 5) and tokenizer.stream()(3) == ""
    with pytest.raises(CheckpointError, match="tokenizer.json is missing .*; prompts of token ids need none"):
        tokenizer.encode("a text")


def test_templates_run_in_a_sandbox_and_speak_for_themselves():
    with pytest.raises(ValueError, match="chat template: roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", CHAT)
    with pytest.raises(ValueError, match="chat template: SecurityError"):
        render_chat("{{ messages.__class__.__mro__ }}", CHAT)
    with pytest.raises(ValueError, match="chat template: TemplateSyntaxError"):
        render_chat("{% for %}", CHAT)
    with pytest.raises(ValueError, match=r"chat template: ZeroDivisionError: division by zero; raw text .* \(--raw\)"):
        render_chat("{{ 1 / 0 }}", CHAT)
    with pytest.raises(ValueError, match="no chat template"):
        render_chat(None, CHAT)
    assert render_chat("a{% generation %}{{ 1 }}b{% endgeneration %}c", CHAT) == "a1bc"
    assert render_chat("{{ messages[1].content | tojson }}", CHAT) == '"Hi <b>&</b> 你好"'
