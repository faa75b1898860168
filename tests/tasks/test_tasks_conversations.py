"""Answers are text of the assistant's: calls of tools, and turns that say nothing, are not."""

import datasets
import pytest

from fedveil import CausalLM, Seq2Seq
from fedveil.errors import DataError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# As many do, it writes whatever it finds.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('too late') }}{% endif %}<{{ m['role'] }}> {{ m['content'] }}"
    "{% if 'tool_calls' in m %} CALL {% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASK = {"role": "user", "content": "how warm is it"}
CALL = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": "{}"}]}
TOOL = {"role": "tool", "content": "20 degrees"}
SAY = {"role": "assistant", "content": "it is warm"}


@pytest.fixture(scope="module")
def tokenizer():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = "<user> <assistant> <tool> how warm is it 20 degrees None CALL"
    made.add_tokens(words.split(" "))
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[UNK]", eos_token="[UNK]"
    )
    found.chat_template = TEMPLATE
    return found


ANSWERS = {
    "none": {**CALL, "content": None},
    "empty": {**CALL, "content": ""},
    "missing": CALL,
    "blank": {**CALL, "content": " \n"},
    "no parts": {**CALL, "content": []},
    "parts without text": {**CALL, "content": [{"type": "image", "text": None}]},
    "old name": {"role": "assistant", "content": None, "function_call": {"name": "weather"}},
    "silent": {"role": "assistant", "content": ""},
}


@pytest.mark.parametrize("kind", [CausalLM, Seq2Seq])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("whole", [True, False])
def test_an_answer_without_text_is_refused(tokenizer, kind, answer, whole):
    row = {"messages": [ASK, answer]} if whole else {"prompt": [ASK], "completion": [answer]}
    found = "no text" if "tool_calls" not in answer and "function_call" not in answer else "a call"
    task = kind(tokenizer)
    for ask in (task.prepare, task.validate, task.questions):
        with pytest.raises(DataError, match=f"row 0 has an empty answer.*found {found}.*Leave"):
            ask([row])


@pytest.mark.parametrize("last", [ASK, TOOL, {"content": "it is"}, "it is"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_answer_of_somebody_else_is_refused(tokenizer, last, whole):
    row = (
        {"messages": [ASK, last]} if whole else {"prompt": [ASK], "completion": [CALL | SAY, last]}
    )
    with pytest.raises(DataError, match="row 0 does not end with an answer"):
        CausalLM(tokenizer).prepare([row])


def test_how_many_rows_are_concerned_is_said(tokenizer):
    rows = [{"messages": [ASK, SAY if row % 3 else CALL]} for row in range(1, 20)]
    with pytest.raises(DataError, match=r"row 2 .*6 of 19 rows .*also 5, 8, 11, 14, 17"):
        CausalLM(tokenizer).prepare(rows)


@pytest.mark.parametrize("table", [True, False])
def test_calls_before_the_answer_are_part_of_the_prompt(tokenizer, table):
    rows = [{"messages": [ASK, {**CALL, "content": None}, TOOL, SAY]}]
    # A table gives every message the keys of all.
    data = datasets.Dataset.from_list(rows) if table else rows
    row = CausalLM(tokenizer).prepare(data).rows[0]
    text = tokenizer.decode(row["input_ids"])
    assert "None" not in text
    assert text.count("CALL") == 1
    learned = [token for token in row["labels"] if token >= 0]
    assert tokenizer.decode(learned).split() == ["it", "is", "warm"]


def test_parts_with_text_are_text(tokenizer):
    answer = {"role": "assistant", "content": [{"type": "text", "text": "it is warm"}]}
    assert CausalLM(tokenizer).questions([{"messages": [ASK, answer]}])[0].references == [
        "it is warm"
    ]


@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
def test_a_completion_without_words_is_refused(tokenizer, answer):
    with pytest.raises(DataError, match="row 0 has an empty answer"):
        CausalLM(tokenizer).prepare([{"prompt": "how", "completion": answer}])


def test_what_a_template_refuses_is_an_error_of_the_row(tokenizer):
    rows = [{"messages": [ASK, {"role": "system", "content": "x"}, SAY]}]
    with pytest.raises(DataError, match=r"row 0 cannot be written.*too late"):
        CausalLM(tokenizer).prepare(rows)
