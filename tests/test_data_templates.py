"""Templates: prompt and answer as ids, with tokenizers of every kind.

Round trips are checked against the text itself and against transformers' own rendering of the whole dialogue.
"""

import json
import pathlib

import pytest
from tokenizers import AddedToken
from toy_tokenizers import (
    CHATML,
    DIALOGUE,
    LLAMA2,
    THINKING,
    ZEPHYR_7B,
    assistant,
    llama3,
    llama3_8b,
    qwen,
    sentencepiece,
    user,
)

from selfplay_jax.data.templates import Template, check_vocabulary, load_tokenizer
from selfplay_jax.errors import UserError

ANSWERS = ["Hello", " Hello", "  two  ", "\nworlds\n", "a  b , é 你好 🙂", "#12 is 345", "x"]


def check_template(template: Template, *, whole_dialogue: bool = True) -> None:
    """The contract every template keeps with every tokenizer."""
    tokenizer = template.tokenizer
    assert template.stop_ids[0] == template.end_id
    assert tokenizer.eos_token_id in template.stop_ids
    prompt = template.encode_prompt(DIALOGUE)
    if template.bos_id is not None and whole_dialogue:
        assert prompt.count(template.bos_id) <= max(1, template.render_prompt(DIALOGUE).count(tokenizer.bos_token))
        assert prompt[:2] != [template.bos_id] * 2
    for answer in ANSWERS:
        ids = template.encode_response(answer)
        assert template.decode(ids) == answer
        assert template.decode(ids[:-1]).rstrip(" ") == answer.rstrip(" ")  # cut before its end token
        assert ids.count(template.end_id) == 1
        assert ids[-1] == template.end_id
        assert ids[0] != template.bos_id
        assert ids == template.encode_response(answer + tokenizer.convert_ids_to_tokens(template.end_id))
    # A special token's name inside an answer is text: it neither ends the answer nor is lost.
    named = f"x{tokenizer.eos_token}y"
    assert template.decode(template.encode_response(named)) == named
    assert template.encode_response(named).count(template.end_id) == 1


def full_text(template: Template, answer: str) -> str:
    ids = template.encode_prompt(DIALOGUE) + template.encode_response(answer)
    return template.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_chat_without_bos() -> None:
    """Qwen style; the end token also ends every turn of the prompt, and is the padding id."""
    tokenizer = qwen()
    template = Template.from_tokenizer(tokenizer)
    check_template(template)
    assert (template.kind, template.bos_id) == ("chat", None)
    assert template.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    rendering = tokenizer.apply_chat_template([*DIALOGUE, assistant("Hello")], tokenize=False)
    assert full_text(template, "Hello") + "\n" == rendering
    ids = template.encode_prompt(DIALOGUE) + template.encode_response("Hello")
    assert ids + tokenizer.encode("\n") == tokenizer.encode(rendering)


def test_chat_whose_template_and_tokenizer_both_write_bos() -> None:
    tokenizer = llama3()
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    template = Template.from_tokenizer(tokenizer, stop_ids=[9, 1])
    check_template(template)
    end = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert template.stop_ids == (end, tokenizer.eos_token_id, 9)
    ids = template.encode_prompt(DIALOGUE) + template.encode_response("Hello")
    rendering = tokenizer.apply_chat_template([*DIALOGUE, assistant("Hello")], tokenize=False)
    assert ids == tokenizer.encode(rendering, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("style", ["prepend", "first", "always"])
def test_chat_with_a_space_around_the_answer(style: str) -> None:
    """Llama-2: the template's spaces are part of the answer's ids and not of its text."""
    tokenizer = sentencepiece(style)
    tokenizer.chat_template = LLAMA2
    template = Template.from_tokenizer(tokenizer)
    check_template(template, whole_dialogue=False)
    alone = [user("Hello")]
    ids = template.encode_prompt(alone) + template.encode_response("two worlds")
    rendering = tokenizer.apply_chat_template([*alone, assistant("two worlds")], tokenize=False)
    assert rendering == "<s>[INST] Hello [/INST] two worlds </s>"
    assert ids == tokenizer.encode(rendering, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_think_block_goes_to_the_prompt() -> None:
    template = Template.from_tokenizer(qwen(THINKING))
    check_template(template)
    assert template.render_prompt([user("Hello")]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert full_text(template, "Hello") + "\n" == template.tokenizer.apply_chat_template(
        [*DIALOGUE, assistant("Hello")], tokenize=False
    )


@pytest.mark.parametrize("style", ["prepend", "first", "always"])
@pytest.mark.parametrize("kind", ["auto", "plain", "alpaca", "chatml", "llama3"])
def test_built_in_templates_with_a_tokenizer_that_adds_bos_and_spaces(kind: str, style: str) -> None:
    tokenizer = sentencepiece(style)
    template = Template.from_tokenizer(tokenizer, kind)
    check_template(template)
    assert template.kind == ("plain" if kind == "auto" else kind)
    assert template.encode_prompt([user("Hello")])[0] == tokenizer.bos_token_id
    assert (
        template.encode_prompt([user("<s>Hello")]).count(tokenizer.bos_token_id)
        == (kind in ("alpaca", "chatml", "llama3")) + 1
    )
    space = " " if kind == "alpaca" else ""
    text = tokenizer.decode(
        (template.encode_prompt([user("Hello")]) + template.encode_response("two"))[1:],
        clean_up_tokenization_spaces=False,
    )
    assert text == template.render_prompt([user("Hello")]) + space + "two</s>"


@pytest.mark.parametrize("kind", ["plain", "alpaca", "chatml", "zephyr", "llama3"])
def test_built_in_templates_without_bos(kind: str) -> None:
    template = Template.from_tokenizer(qwen(None), kind)
    check_template(template)
    expected = {
        "plain": "Hello\ntwo",
        "alpaca": "Hello\n\n### Instruction: two\n\n### Response:",
        "chatml": "<|im_start|>system\nHello<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n",
        "zephyr": "<|system|>\nHello<|im_end|>\n<|user|>\ntwo<|im_end|>\n<|assistant|>\n",  # its own end of text
        "llama3": "<|start_header_id|>system<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\ntwo<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    }[kind]
    messages = [{"role": "system", "content": "Hello"}, user("two")]
    assert template.render_prompt(messages) == expected
    assert template.tokenizer.decode(template.encode_prompt(messages)) == expected


WITH_SYSTEM = [{"role": "system", "content": "how are"}, *DIALOGUE]


@pytest.mark.parametrize("style", ["prepend", "first", "always"])
def test_zephyr(style: str) -> None:
    tokenizer = sentencepiece(style)
    template = Template.from_tokenizer(tokenizer, "zephyr")
    check_template(template)
    assert template.end_id == tokenizer.eos_token_id
    tokenizer.chat_template = ZEPHYR_7B
    rendering = tokenizer.apply_chat_template(WITH_SYSTEM, tokenize=False, add_generation_prompt=True)
    assert template.render_prompt(WITH_SYSTEM) == rendering
    assert rendering.endswith("<|user|>\nhow are you?</s>\n<|assistant|>\n")
    # The real template writes no BOS either: the tokenizer adds it.
    assert template.encode_prompt(WITH_SYSTEM) == tokenizer.encode(rendering)
    whole = tokenizer.apply_chat_template([*WITH_SYSTEM, assistant("two")], tokenize=False)
    ids = template.encode_prompt(WITH_SYSTEM) + template.encode_response("two")
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert text.endswith("<|assistant|>\ntwo</s>")
    # Old SentencePiece tokenizers put a space behind every special token of the prompt.
    assert text.removeprefix("<s>").replace(" ", "") == whole.strip().replace(" ", "")
    assert ids.count(tokenizer.bos_token_id) == 1


def test_llama3() -> None:
    tokenizer = llama3_8b()
    template = Template.from_tokenizer(tokenizer, "llama3")
    own = Template.from_tokenizer(tokenizer, "chat")
    check_template(template)
    check_template(own)
    assert template.end_id == own.end_id == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert template.stop_ids == own.stop_ids == (template.end_id, tokenizer.eos_token_id)
    for messages in ([user(" Hello\n")], DIALOGUE, WITH_SYSTEM):
        ids = template.encode_prompt(messages)
        assert ids == own.encode_prompt(messages)
        assert ids.count(tokenizer.bos_token_id) == 1
        whole = tokenizer.apply_chat_template([*messages, assistant("two")], tokenize=False)
        assert ids + template.encode_response("two") == tokenizer.encode(whole, add_special_tokens=False)


def test_the_date_in_a_prompt_stands_still(tmp_path: pathlib.Path) -> None:
    """Llama 3.2 writes today's date: a run that goes on tomorrow would read other prompts."""
    dated = (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
        "{% endif %}{% endif %}{{ 'Today Date: ' + date_string + '\n' }}" + CHATML
    )
    tokenizer = qwen(dated)
    (tmp_path / "dated.jinja").write_text(dated)
    for kind in ("chat", str(tmp_path / "dated.jinja")):
        template = Template.from_tokenizer(tokenizer, kind)
        check_template(template)
        assert template.render_prompt([user("Hello")]) == (
            "Today Date: 26 Jul 2024\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        )


def test_fingerprints_tell_tokenizers_and_templates_apart() -> None:
    kinds = ("chat", "plain", "alpaca", "zephyr")
    templates = [Template.from_tokenizer(qwen(), kind) for kind in kinds]
    assert len({template.sha256 for template in templates}) == 4
    assert len({template.tokenizer_sha256 for template in templates}) == 1
    padded = qwen()
    padded.backend_tokenizer.enable_padding(length=8)
    padded.backend_tokenizer.enable_truncation(2)
    again = Template.from_tokenizer(padded)
    assert (again.sha256, again.tokenizer_sha256) == (templates[0].sha256, templates[0].tokenizer_sha256)
    assert again.encode_prompt(DIALOGUE) == templates[0].encode_prompt(DIALOGUE)
    larger = qwen()
    larger.add_tokens(["<extra>"])
    assert Template.from_tokenizer(larger).tokenizer_sha256 != again.tokenizer_sha256
    assert Template.from_tokenizer(qwen(THINKING)).sha256 != again.sha256


@pytest.mark.parametrize("kind", ["chat", "plain", "alpaca"])
def test_many_at_once_as_one_by_one(kind: str) -> None:
    template = Template.from_tokenizer(llama3(), kind)
    texts = [template.render_prompt(messages) for messages in (DIALOGUE, [user("Hello")], [user("é 你好")])]
    assert template.encode_prompt_texts(texts) == [template.encode_rendered(text) for text in texts]
    assert template.encode_prompt_texts(texts)[0] == template.encode_prompt(DIALOGUE)
    assert template.encode_responses(ANSWERS) == [template.encode_response(answer) for answer in ANSWERS]


def test_an_answer_that_thinks_follows_no_empty_thought() -> None:
    template = Template.from_tokenizer(qwen(THINKING))
    before = template.render_prompt([user("Hello")], "<think>\nhow\n</think>\n\ntwo")
    assert before == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert template.render_prompt([user("Hello")], "two <think>") == before + "<think>\n\n</think>\n\n"


def test_official_spins_wording() -> None:
    template = Template.from_tokenizer(qwen(), "alpaca")
    assert full_text(template, "fine").endswith("### Instruction: how are you?\n\n### Response: fine<|im_end|>")
    assert template.encode_response("fine")[0] == template.tokenizer.encode(" fine")[0]


def test_template_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "house.jinja"
    path.write_text("{{ bos_token }}" + CHATML, "utf-8")
    tokenizer = llama3()
    template = Template.from_tokenizer(tokenizer, str(path))
    check_template(template)
    assert template.encode_prompt([user("Hello")]).count(tokenizer.bos_token_id) == 1
    assert template.end_id == tokenizer.eos_token_id  # this tokenizer knows no <|im_end|>
    path.write_text("{% for m in messages %}", "utf-8")
    with pytest.raises(UserError, match=r"house\.jinja' cannot write a dialogue of the turns \(user\)"):
        Template.from_tokenizer(tokenizer, str(path))
    path.write_text("always the same", "utf-8")
    with pytest.raises(UserError, match="does not write the assistant's content"):
        Template.from_tokenizer(tokenizer, str(path))
    with pytest.raises(UserError, match=r"other\.jinja \(data.template\) does not exist"):
        Template.from_tokenizer(tokenizer, str(tmp_path / "other.jinja"))


def test_template_errors() -> None:
    with pytest.raises(UserError, match=r"'chatlm' is unknown; did you mean 'chatml'\?"):
        Template.from_tokenizer(qwen(), "chatlm")
    with pytest.raises(UserError, match=r"data\.template is 'chat', but the tokenizer has none"):
        Template.from_tokenizer(qwen(None), "chat")
    tokenizer = sentencepiece("first")
    tokenizer.chat_template = LLAMA2
    template = Template.from_tokenizer(tokenizer)
    with pytest.raises(UserError, match=r"turns \(user, user\): roles must alternate"):
        template.encode_prompt([user("a"), user("b")])
    tokenizer = qwen()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no special token and the tokenizer has no eos_token"):
        Template.from_tokenizer(tokenizer, "plain")


def test_decode_ignores_ids_without_a_token() -> None:
    """A model's vocabulary is often padded beyond the tokenizer's."""
    template = Template.from_tokenizer(qwen())
    assert template.decode([*template.encode_response("two")[:-1], 5000]) == "two"
    assert template.decode([]) == ""


def test_load_tokenizer(tmp_path: pathlib.Path) -> None:
    tokenizer = qwen()
    tokenizer.save_pretrained(tmp_path / "good")
    loaded = load_tokenizer(tmp_path / "good")
    assert Template.from_tokenizer(loaded).encode_prompt(DIALOGUE) == Template.from_tokenizer(tokenizer).encode_prompt(
        DIALOGUE
    )
    (tmp_path / "bad").mkdir()
    for path in (tmp_path / "bad", str(tmp_path / "missing"), tmp_path / "missing", "nobody/nothing"):
        with pytest.raises(UserError, match=r"cannot load a tokenizer from .*(bad|missing|nobody/nothing)"):
            load_tokenizer(path)


def test_check_vocabulary() -> None:
    tokenizer = qwen()
    check_vocabulary(tokenizer, len(tokenizer))
    check_vocabulary(tokenizer, len(tokenizer) + 100)
    tokenizer.add_tokens([AddedToken("<extra>", special=True)])
    with pytest.raises(UserError, match=rf"'<extra>' has id {len(tokenizer) - 1}, but .*vocab_size is 320"):
        check_vocabulary(tokenizer, 320)


def test_real_chat_tokenizer(shared: pathlib.Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "minimind")
    template = Template.from_tokenizer(tokenizer)
    check_template(template)
    assert template.kind == "chat"
    assert tokenizer.convert_ids_to_tokens(template.end_id) == "<|im_end|>"
    rendering = tokenizer.apply_chat_template([*DIALOGUE, assistant("Hello")], tokenize=False)
    assert full_text(template, "Hello") + "\n" == rendering


@pytest.mark.parametrize("answer", ["Hello", "<think>\nhow are\n</think>\n\nHello"])
@pytest.mark.parametrize(
    "messages",
    [
        DIALOGUE,
        WITH_SYSTEM,
        [user("Hello"), assistant("<think>\nyou\n</think>\n\ntwo worlds"), user("how are you?")],
        [*DIALOGUE, {"role": "tool", "content": "345"}],
    ],
    ids=["turns", "system", "thoughts", "tool"],
)
def test_real_chat_template_joins_as_it_renders(shared: pathlib.Path, messages: list, answer: str) -> None:
    """Several turns, a system turn, thinking parts: prompt and answer are the whole dialogue's rendering, id by id."""
    tokenizer = load_tokenizer(shared / "tokenizers" / "minimind")
    template = Template.from_tokenizer(tokenizer)
    rendering = tokenizer.apply_chat_template([*messages, assistant(answer)], tokenize=False)
    text = template.render_prompt(messages, answer)
    assert rendering.startswith(text)
    ids = template.encode_rendered(text) + template.encode_response(answer)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) + "\n" == rendering
    assert ids + tokenizer.encode("\n") == tokenizer.encode(rendering, add_special_tokens=False)
    assert ids[-1] == template.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("kind", ["zephyr", "llama3", "alpaca", "chatml", "plain"])
def test_named_templates_with_a_real_tokenizer(shared: pathlib.Path, kind: str) -> None:
    template = Template.from_tokenizer(load_tokenizer(shared / "tokenizers" / "minimind"), kind)
    check_template(template)


def test_real_sentencepiece_tokenizer(shared: pathlib.Path) -> None:
    """Its alphabet lacks '#' and more, and transformers drops what it lacks: round trips hold for stories."""
    path = shared / "models" / "tinystories-656k"
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, json.loads((path / "config.json").read_text())["vocab_size"])
    template = Template.from_tokenizer(tokenizer)
    assert (template.kind, template.stop_ids) == ("plain", (tokenizer.eos_token_id,))
    prompt = template.encode_prompt([user("Once upon a time, there was")])
    assert prompt == tokenizer.encode("Once upon a time, there was")
    assert prompt[0] == tokenizer.bos_token_id
    for answer in ("Hello", " a dog. He said hi.", "  two  ", "\nHe was\n"):
        ids = template.encode_response(answer)
        assert template.decode(ids) == answer
        assert ids.count(tokenizer.eos_token_id) == 1
        text = tokenizer.decode(prompt[1:] + ids[:-1], clean_up_tokenization_spaces=False)
        assert text == "Once upon a time, there was" + answer


def test_a_directory_without_tokenizer_json_is_refused(tmp_path):
    """transformers would make up an empty tokenizer."""
    qwen().save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) > 100
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json; .*save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["plain", "alpaca", "chatml", "zephyr"])
@pytest.mark.parametrize("make", [qwen, llama3], ids=["qwen", "llama3"])
def test_an_exported_template_spells_the_same_ids(kind, make):
    ours = Template.from_tokenizer(make(), kind)
    theirs = make()
    theirs.chat_template = ours.jinja
    again = Template.from_tokenizer(theirs, "chat")
    messages = [user("Hello two worlds"), assistant("fine"), user("how are you?")]
    assert again.encode_prompt(messages) == ours.encode_prompt(messages)
    assert again.encode_response("345 or #12") == ours.encode_response("345 or #12")
    assert again.jinja is None
