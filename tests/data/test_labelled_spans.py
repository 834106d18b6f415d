import gzip
import json
import lzma

import numpy as np
import pytest

from selfsup.data.labelled_spans import LabelledSpans
from selfsup.data.labels import Labelled, split
from selfsup.data.span_files import NO_ANSWER, Answer, read
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError

LETTERS = Tokenizer.train(
    TokenizerConfig(kind="character", vocab_size=64), ["q", "abcdefghijklmnopqrstuvwxyz"]
)
TEN = "abcdefghij"


def questions(*answers, context=TEN, question="qq", names=()):
    """Each question has the given list of (text, start), or None."""
    labels = [None if a is None else [Answer(*one) for one in a] for a in answers]
    return Labelled("span_qa", [(question, context)] * len(labels), labels, names, "toy")


# Windows


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        (("ab", 0), [(4, 5), (0, 0)]),  # in the first window
        (("ij", 8), [(0, 0), (8, 9)]),  # in the second
        (("ef", 4), [(8, 9), (4, 5)]),  # in both
        (("cdefghi", 2), [(0, 0), (0, 0)]),  # whole in none
        (("a", 0), [(4, 4), (0, 0)]),
        (("g", 6), [(10, 10), (6, 6)]),
        (("h", 7), [(0, 0), (7, 7)]),
    ],
)
def test_an_answer_is_labelled_in_each_window_that_holds_it_whole(answer, labels):
    """Rows of 12: [CLS] q q [SEP], seven letters, [SEP]; the stride is a third of 12."""
    data = LabelledSpans(questions([answer]), LETTERS, 12)
    assert [tuple(window) for window in data.windows] == [(0, 0, 7), (0, 4, 10)]
    assert data.batch(np.arange(2))["label"].tolist() == [list(label) for label in labels]


def test_rows_hold_question_and_window():
    data = LabelledSpans(questions([("ab", 0)]), LETTERS, 12)
    batch = data.batch(np.array([1, 0]))
    shown = [[LETTERS.token(i) for i in row] for row in batch["tokens"].tolist()]
    start = ["[CLS]", "q", "q", "[SEP]"]
    assert shown == [[*start, *"efghij", "[SEP]", "[PAD]"], [*start, *"abcdefg", "[SEP]"]]
    assert batch["segments"].tolist() == [[0] * 4 + [1] * 7 + [0], [0] * 4 + [1] * 8]
    assert batch["mask"].tolist() == [[True] * 11 + [False], [True] * 12]
    assert batch["index"].tolist() == [1, 0]
    assert data.lengths.tolist() == [12, 11]
    assert set(batch) == set(data.fields)


def test_rows_of_roberta_have_two_separators_before_the_document():
    roberta = Tokenizer(LETTERS.to_json().replace("[SEP]", "</s>"))
    data = LabelledSpans(questions([("hi", 7)]), roberta, 13)
    (batch,) = [data.batch(np.array([1]))]
    shown = [roberta.token(i) for i in batch["tokens"][0].tolist()]
    assert shown == ["[CLS]", "q", "q", "</s>", "</s>", *"efghij", "</s>"]
    assert [shown[i] for i in batch["label"][0]] == ["h", "i"]
    assert data.lengths.tolist() == [13, 12]
    assert data.collect([[5, 5], batch["label"][0]], [(-9.0, 0.0), (0.0, 0.0)])[1] == ["hi"]


def test_a_short_document_is_one_window_without_a_mask():
    data = LabelledSpans(questions([("j", 9)], [("a", 0)]), LETTERS, 15)
    assert [tuple(window) for window in data.windows] == [(0, 0, 10), (1, 0, 10)]
    batch = data.batch(np.arange(2))
    assert "mask" not in batch
    assert batch["label"].tolist() == [[13, 13], [4, 4]]


@pytest.mark.parametrize("length", [7, 8, 23, 60])
@pytest.mark.parametrize("stride", [1, 2, 4, 5])
def test_windows_cover_every_token_and_only_the_last_reaches_the_end(length, stride):
    context = (TEN * 6)[:length]
    data = LabelledSpans(questions([("a", 0)], context=context), LETTERS, 12, stride)
    starts = [window.first for window in data.windows]
    assert starts == [stride * i for i in range(len(starts))]
    seen = set().union(*(range(window.first, window.end) for window in data.windows))
    assert seen == set(range(length))
    assert [window.end == length for window in data.windows].count(True) == 1
    assert data.windows[-1].end == length


def test_long_questions_are_cut_and_counted():
    data = LabelledSpans(questions([("a", 0)], question="q" * 30), LETTERS, 13)
    assert data.truncated == 1
    row = [LETTERS.token(i) for i in data.batch(np.array([0]))["tokens"][0].tolist()]
    assert row == ["[CLS]", *"qqqqq", "[SEP]", *"abcde", "[SEP]"]  # half of the 10 that are free
    wide = LabelledSpans(questions([("a", 0)], question="q" * 90), LETTERS, 300)
    assert len(wide.questions[0]) == 64


def test_no_answer_and_answers_not_known():
    """[] is no answer, None an item without label, -1 an answer that is no span."""
    cases = [[], None, [("elsewhere", -1)], [("elsewhere", -1), ("b", 1)]]
    data = LabelledSpans(questions(*cases), LETTERS, 20)
    assert data.batch(np.arange(4))["label"].tolist() == [
        [0, 0],
        [-100, -100],
        [-100, -100],
        [5, 5],
    ]


def test_settings_that_do_not_fit_are_refused():
    labelled = questions([("a", 0)])
    with pytest.raises(ConfigError, match="at least 8 tokens, got 7"):
        LabelledSpans(labelled, LETTERS, 7)
    windows = LabelledSpans(labelled, LETTERS, 8).windows  # three letters a row, two at a time
    assert [window.first for window in windows] == [0, 2, 4, 6, 8]
    for stride in (0, 6):
        with pytest.raises(ConfigError, match=rf"from 1 to 5 tokens for rows of 12.* got {stride}"):
            LabelledSpans(labelled, LETTERS, 12, stride)
    gpt = Tokenizer.train(TokenizerConfig(kind="character", vocab_size=64, style="gpt"), [TEN])
    with pytest.raises(ConfigError, match=r'a \[CLS\] token.*data.tokenizer.style = "bert"'):
        LabelledSpans(labelled, gpt, 12)


# From tokens back to characters

TEXTS = [
    "Ann met Zoë in Paris — twice; she (35) laughed!  Then\nBob left.",
    "《战国无双3》是由光荣和ω-force开发的，2009年12月3日正式发售。",
    "naïve café 👩‍👩‍👧 𫚭,俗名龙尖 end\u3000full width ＡＢ",
]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "character", "byte"])
def test_offsets_say_where_tokens_stand(kind):
    config = TokenizerConfig(kind=kind, vocab_size=300, style="bert")
    tokenizer = Tokenizer.train(config, TEXTS * 20)
    plain = tokenizer.encode(TEXTS, parse_special=False)
    for text, ids, (again, offsets) in zip(
        TEXTS, plain, tokenizer.encode_with_offsets(TEXTS), strict=True
    ):
        assert again.tolist() == ids.tolist()
        assert offsets.shape == (len(ids), 2)
        assert (np.diff(offsets[:, 0]) >= 0).all()
        covered = set().union(*(range(first, end) for first, end in offsets))
        assert covered >= {i for i, sign in enumerate(text) if sign.isalnum()}
        for first, end in offsets:
            assert text[first:end] == text[first:end].strip()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "character", "byte"])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (0, "Zoë"),
        (0, "Paris"),
        (0, "35"),
        (0, "Bob left"),
        (1, "战国无双"),
        (2, "俗名龙尖"),
    ],
)
def test_the_labelled_tokens_give_the_answer_back(kind, text, answer):
    tokenizer = Tokenizer.train(TokenizerConfig(kind=kind, vocab_size=700), TEXTS * 20)
    context = TEXTS[text]
    labelled = Labelled(
        "span_qa", [("Who?", context)], [[Answer(answer, context.index(answer))]], (), "toy"
    )
    data = LabelledSpans(labelled, tokenizer, 60)
    labels = data.batch(np.arange(len(data)))["label"].numpy()
    scores = [np.array([0.0 if label[0] else -9.0, -1.0]) for label in labels]
    values = [label if label[0] else np.array([8, 8]) for label in labels]
    truth, guess = data.collect(values, scores)
    assert truth == labelled.labels
    if kind in ("character", "byte"):
        assert guess == [answer]
    else:  # a token may reach beyond the answer, never fall short of it
        assert answer in guess[0]
        assert len(guess[0]) <= len(answer) + 12


def test_unknown_words_are_answers_too():
    labelled = questions([("四五", 3)], context="abc四五def")
    data = LabelledSpans(labelled, LETTERS, 20)
    label = data.batch(np.array([0]))["label"].numpy()
    assert data.collect(label, [np.zeros(2)])[1] == ["四五"]


def test_a_document_that_vanishes_keeps_a_token():
    ids, offsets = LETTERS.encode_with_offsets(["\u200b"])[0]
    assert len(ids) == len(offsets) == 1


# From rows to answers


def test_the_likeliest_span_of_all_windows_answers():
    data = LabelledSpans(questions([("ab", 0)], [("ij", 8)]), LETTERS, 12)
    values = [np.array(v, dtype=np.float32) for v in [(4, 5), (8, 9), (5, 5), (7, 9)]]
    scores = [np.array(s) for s in [(-1.0, -5.0), (-2.0, -0.1), (-3.0, -0.1), (-2.5, -0.1)]]
    truth, guess = data.collect(values, scores)
    assert truth == [[("ab", 0)], [("ij", 8)]]
    assert guess == ["ab", "hij"]


def test_nothing_is_answered_only_where_the_data_hold_unanswerable_questions():
    """Question 0: no window prefers a span. Question 1: one does, if not by much."""
    values = [np.array([4, 5])] * 4
    scores = [np.array(s) for s in [(-3, -2), (-4, -0.1), (-1, -1.5), (-9, -0.1)]]
    for names, expected in (((), ["ab", "ab"]), ((NO_ANSWER,), ["", "ab"])):
        data = LabelledSpans(questions([], [("ab", 0)], names=names), LETTERS, 12)
        assert data.collect(values, scores)[1] == expected


# Files


def squad(**changes):
    """Two articles of two and one questions."""
    first = {"id": "a1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    second = {"id": "a2", "question": "What?", "answers": [{"text": "ran", "answer_start": 4}]}
    third = {"id": "b1", "question": "Where?", "answers": [{"text": "Rome", "answer_start": 3}]}
    first |= changes
    return {
        "version": "1.1",
        "data": [
            {"title": "A", "paragraphs": [{"context": "Ann ran.", "qas": [first, second]}]},
            {"title": "B", "paragraphs": [{"context": "In Rome.", "qas": [third]}]},
        ],
    }


def written(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["train.json", "train.json.gz", "train-v1.1.json.xz"])
def test_squad_is_read(tmp_path, name):
    found = read(written(tmp_path / name, squad()))
    assert found.items == [("Who?", "Ann ran."), ("What?", "Ann ran."), ("Where?", "In Rome.")]
    assert found.labels == [[("Ann", 0)], [("ran", 4)], [("Rome", 3)]]
    assert (found.task, found.names, found.groups) == ("span_qa", (), ("A", "A", "B"))


def test_unanswerable_questions_of_squad_2_have_no_answer(tmp_path):
    changes = {"is_impossible": True, "answers": [], "plausible_answers": [{"text": "x"}]}
    path = written(tmp_path / "train.json", squad(**changes))
    assert read(path).labels[0] == []
    assert read(path).names == (NO_ANSWER,)
    assert read(written(tmp_path / "dev.json", squad()), names=(NO_ANSWER,)).names == (NO_ANSWER,)


@pytest.mark.parametrize(
    "given",
    [
        [{"text": "Ann", "answer_start": 0}],
        {"text": "Ann", "answer_start": 0},
        {"text": ["Ann"], "answer_start": [0]},
        ["Ann"],
        "Ann",
    ],
)
def test_rows_of_questions_are_read(tmp_path, given):
    rows = [
        {"question": "Who?", "context": "Ann ran.", "answers": given},
        {"question": "Which?", "context": "Nothing.", "answers": []},
        {"question": "Where?", "context": "In Rome.", "answers": "Rome", "title": "B"},
    ]
    path = written(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    found = read(path)
    assert found.labels == [[("Ann", 0)], [], [("Rome", 3)]]
    assert found.groups == ("Ann ran.", "Nothing.", "B")
    assert found.names == (NO_ANSWER,)


def test_columns_may_have_other_names(tmp_path):
    row = {"q": "Who?", "passage": "Ann ran.", "gold": "Ann"}
    path = written(tmp_path / "rows.jsonl", json.dumps(row))
    assert read(path, text="q", text_b="passage", label="gold").labels == [[("Ann", 0)]]
    with pytest.raises(
        DataError, match=r"no column called question; say which with text=NAME.*'q'"
    ):
        read(path)
    with pytest.raises(DataError, match="no column 'pasage' for text_b; did you mean 'passage'"):
        read(path, text="q", text_b="pasage", label="gold")


@pytest.mark.parametrize(
    ("context", "text", "start", "expected", "said"),
    [
        (
            "𫚭，俗名龙尖。",
            "俗名龙尖",
            3,
            ("俗名龙尖", 2),
            "1 answers have places counted in",
        ),
        ("Ann  ran home.", "Ann ran", 0, ("Ann  ran", 0), "1 answers differed by white space"),
        ("Ann ran.", " ran", 3, (" ran", 3), ""),
        ("Ann ran.", "ran ", 4, ("ran", 4), "1 answers differed by white space"),
        ("Ann ran.", "ran", 3, ("ran", 4), "1 answers differed by white space"),
        ("Ann ran.", "She ran", -1, ("She ran", -1), "1 answers are no span"),
        ("ran ran", "ran", None, ("ran", 0), "1 answers without a place stand several times"),
    ],
)
def test_what_is_put_right_is_said(tmp_path, capsys, context, text, start, expected, said):
    row = {"question": "?", "context": context, "answers": {"text": text, "answer_start": start}}
    found = read(written(tmp_path / "rows.jsonl", json.dumps(row)))
    assert found.labels == [[expected]]
    message = capsys.readouterr().err
    assert said in message
    assert bool(message) == bool(said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answers": [{"text": "Rome", "answer_start": 0}]},
            "the answer 'Rome' is not at answer_start = 0, where the document has "
            "'Ann '; it is nowhere in the document",
        ),
        (
            {"answers": [{"text": "ran", "answer_start": 0}]},
            "the answer 'ran' is not at answer_start = 0, .* it stands at 4",
        ),
        ({"answers": [{"text": "ran", "answer_start": -2}]}, "answer_start must be at least 0"),
        ({"answers": [{"text": "ran", "answer_start": "4"}]}, "a whole number, got '4'"),
        ({"answers": [{"text": "ran", "answer_start": 99}]}, "is not at answer_start = 99"),
        ({"answers": [{"text": "  ", "answer_start": 3}]}, "an answer: 'text' is empty"),
        ({"answers": [{"answer_start": 3}]}, "an answer: expected an object with a str 'text'"),
        ({"answers": []}, "has no answer; say is_impossible = true"),
        ({"answers": {}}, "expected an object with a list 'answers'"),
        ({"question": " "}, "'question' is empty"),
        ({"question": None}, "expected an object with a str 'question'"),
    ],
)
def test_errors_name_file_and_question(tmp_path, changes, message):
    path = written(tmp_path / "train.json", squad(**changes))
    with pytest.raises(DataError, match=rf"train\.json: question a1: .*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "expected an object with a list 'data'"),
        ('{"data": []}', "holds no question"),
        ('{"data": [{"title": "A"}]}', r"data\[0\]: expected an object with a list 'paragraphs'"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"data\[0\].paragraphs\[0\]: .* 'context'"),
        ('{"data": [', "not JSON"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(written(tmp_path / "train.json", content))


def test_an_empty_question_is_counted_and_left_out(tmp_path, capsys):
    document = squad()
    asked = document["data"][0]["paragraphs"][0]["qas"]
    asked.append({**asked[0], "id": "none", "question": ""})
    path = written(tmp_path / "train.json", document)
    assert len(read(path).items) == len(read(written(tmp_path / "other.json", squad())).items)
    assert "1 answers belong to an empty question, and are left out" in capsys.readouterr().err


def test_other_errors_of_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.json")
    with pytest.raises(DataError, match="the suffix does not name a known format"):
        read(tmp_path / "train.txt")
    path = written(tmp_path / "train.json", squad())
    with pytest.raises(ConfigError, match="has no columns"):
        read(path, text="question")
    with pytest.raises(ConfigError, match="span_qa, not 'tagging'"):
        read(path, "tagging")
    row = {"question": "?", "context": "Ann ran.", "answers": "Bob"}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the answer 'Bob' is not in its document"):
        read(written(tmp_path / "rows.jsonl", json.dumps(row)))
    rows = '{"question": "?", "context": "A b.", "answers": "b"}\n{"question": "?", "context": "c"}'
    with pytest.raises(DataError, match=r"more\.jsonl:2: 'answers' is missing"):
        read(written(tmp_path / "more.jsonl", rows))


def test_no_article_is_on_two_sides_of_a_split(tmp_path):
    articles = []
    for number in range(12):
        qas = [
            {
                "id": f"{number}-{i}",
                "question": f"?{i}",
                "answers": [{"text": "x", "answer_start": 0}],
            }
            for i in range(1 + number % 5)
        ]
        paragraphs = [
            {"context": f"x{number}", "qas": qas},
            {"context": f"x, {number}", "qas": qas},
        ]
        articles.append({"title": f"T{number}", "paragraphs": paragraphs})
    found = read(written(tmp_path / "train.json", {"data": articles}))
    for seed in range(5):
        parts = split(found, (0.5, 0.25, 0.25), seed)
        titles = [set(part.groups) for part in parts]
        assert sum(map(len, titles)) == len(set().union(*titles)) == 12
        assert sum(map(len, parts)) == len(found)
