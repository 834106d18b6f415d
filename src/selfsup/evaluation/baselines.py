"""Classical baselines: what a good model without pre-training reaches on the same labels.

| task           | model                                                                           |
|----------------|---------------------------------------------------------------------------------|
| classification | TF-IDF of words (1-2) or of characters (2-5), logistic regression               |
| regression     | the same features, ridge regression                                             |
| tagging        | each word's most frequent tag, or logistic regression over hashed word features |
| span_qa        | the span nearest to the question's words: span_baseline.py                      |
| generation     | a translation memory, the source or its first words: text_baseline.py           |
| not of text    | raw input or its principal components, logistic or ridge regression             |

For pairs of texts the features are both TF-IDF vectors, their absolute difference, their product
and its sum, the cosine. Every choice (features, regularisation, kind of tagger) is made on the
validation data; the model is fitted on the training data alone, as the neural ones are. There is
no randomness. A pre-trained model that does not beat these was not worth its training.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from selfsup.batch import Vocabulary
from selfsup.data.dataset import Preprocessor
from selfsup.data.labels import Labelled
from selfsup.evaluation import span_baseline, text_baseline
from selfsup.evaluation.frozen import extract, raw_features
from selfsup.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

LOGISTIC_C = (0.1, 1.0, 10.0, 100.0)
RIDGE_ALPHA = (0.1, 1.0, 10.0, 100.0)
TAGGER_C = (1.0, 10.0)
DENSE_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DENSE_ALPHA = (1.0, 10.0, 100.0, 1000.0)
PRINCIPAL = 50
# Words with one letter and marks such as ! count too; short reviews live on them.
WORD = r"\w+|[^\w\s]"
SPACED = 0.05  # share of white space above which a text is written with spaces between words
MAX_CHARACTERS = 4_000_000  # for spaced texts beyond it, character n-grams are not tried
MAX_FEATURES = 100_000
MAX_WEIGHTS = 50_000_000  # features * classes
TAG_FEATURES = 2**17

# Tasks with baselines of their own: names and predictors, fitted on the training examples.
CANDIDATES = {"span_qa": span_baseline.candidates, "generation": text_baseline.candidates}
SCORED_BY = {"regression": "spearman", "span_qa": "answer_f1", "generation": "bleu"}

Predict = Callable[[list[Any]], list[Any]]
Featuriser = Callable[[list[Any]], "sparse.csr_matrix | np.ndarray"]


@dataclass(frozen=True)
class Baseline:
    """A fitted classical model.

    Attributes:
        name: what was chosen, for people.
        score: its metric on the validation data: accuracy, or that of `SCORED_BY`.
        predict: items to labels, both in the form of `Labelled`.

    >>> films = ["good fun", "bad", "so good", "so bad", "good", "bad end"]
    >>> toy = Labelled("classification", films, list("101010"), ("0", "1"), "toy")
    >>> fit_baseline(toy, toy).predict(["good film"])
    ['1']
    """

    name: str
    score: float
    predict: Predict = field(repr=False)


def fit_baseline(
    train: Labelled, valid: Labelled, preprocessor: Preprocessor | None = None
) -> Baseline:
    """Fits every candidate on `train` and returns the one that is best on `valid`.

    Args:
        train: training examples; may be a small `subset`.
        valid: other examples of the same task.
        preprocessor: reads the items; None: they are text.
    """
    metric = METRICS[SCORED_BY.get(train.task, "accuracy")]
    if train.task in CANDIDATES:
        fitted = [
            Baseline(name, metric(valid.labels, predict(valid.items)), predict)
            for name, predict in CANDIDATES[train.task](train)
        ]
        return max(fitted, key=lambda one: one.score)
    name, predict = _simplest(train)
    best = Baseline(name, metric(valid.labels, predict(valid.items)), predict)
    known_labels, valid_labels = _flat_labels(train), _flat_labels(valid)
    if len(set(known_labels)) == 1:  # in a very small subset
        return best
    if preprocessor is None or isinstance(preprocessor.spec, Vocabulary):
        featurisers, models = _featurisers(train), _models
    else:
        featurisers, models = _raw_featurisers(train, preprocessor), _dense_models
    for kind, features in featurisers:
        known, new = features(train.items), features(valid.items)
        for setting, model in models(train.task):
            # Sparse solvers take many short steps: BLAS threads would mostly wait for each other.
            with threadpool_limits(1):
                model.fit(known, known_labels)
            score = metric(valid_labels, model.predict(new).tolist())
            if score > best.score:  # of equals the first, the simpler
                best = Baseline(
                    f"{kind} + {setting}", score, _predictor(model, features, train.task)
                )
    return best


def _flat_labels(labelled: Labelled) -> list[Any]:
    if labelled.task == "tagging":
        return list(itertools.chain.from_iterable(labelled.labels))
    return labelled.labels


def _simplest(train: Labelled) -> tuple[str, Predict]:
    if train.task == "tagging":
        return "most frequent tag of the word", _frequent_tag(train)
    if train.task == "regression":
        mean = float(np.mean(train.labels))
        return "mean label", lambda items: [mean] * len(items)
    commonest = Counter(train.labels).most_common(1)[0][0]
    return "most frequent class", lambda items: [commonest] * len(items)


def _models(task: str) -> Iterator[tuple[str, Any]]:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if task == "regression":
        for alpha in RIDGE_ALPHA:
            yield f"ridge regression, alpha={alpha:g}", Ridge(alpha, solver="sparse_cg")
        return
    for c in TAGGER_C if task == "tagging" else LOGISTIC_C:
        # liblinear's trust-region Newton method converges in some tens of steps on sparse rows;
        # it is binary, so each class is held against the rest.
        one = LogisticRegression(C=c, solver="liblinear", random_state=0, max_iter=1000)
        yield f"logistic regression, C={c:g}", OneVsRestClassifier(one)


def _dense_models(task: str) -> Iterator[tuple[str, Any]]:
    """For standardised columns, few or many."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if task == "regression":
        for alpha in DENSE_ALPHA:
            yield f"ridge regression, alpha={alpha:g}", Ridge(alpha)
        return
    for c in DENSE_C:
        one = LogisticRegression(C=c, max_iter=2000, tol=1e-3)
        yield f"logistic regression, C={c:g}", one


def _raw_featurisers(
    train: Labelled, preprocessor: Preprocessor
) -> Iterator[tuple[str, Featuriser]]:
    """The input as it comes, standardised, and its principal components; fitted on `train`."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    known: list[tuple[list[Any], np.ndarray]] = []  # decoding is slow: each list is read once

    def raw(items: list[Any]) -> np.ndarray:
        for seen, matrix in known:
            if seen is items:
                return matrix
        unlabelled = replace(train, items=items, labels=[train.labels[0]] * len(items), groups=())
        known.append((items, extract(preprocessor.raw().labelled(unlabelled), raw_features)))
        return known[-1][1]

    scale = StandardScaler().fit(raw(train.items))
    yield "raw input", lambda items: scale.transform(raw(items))
    size = min(PRINCIPAL, *scale.transform(raw(train.items)).shape)
    components = PCA(size, whiten=True, random_state=0).fit(scale.transform(raw(train.items)))
    yield (
        f"{size} principal components",
        lambda items: components.transform(scale.transform(raw(items))),
    )


def _predictor(model: Any, features: Featuriser, task: str) -> Predict:
    def predict(items: list[Any]) -> list[Any]:
        flat = model.predict(features(items)).tolist()
        if task != "tagging":
            return flat
        rest = iter(flat)
        return [list(itertools.islice(rest, len(words))) for words in items]

    return predict


def _featurisers(train: Labelled) -> Iterator[tuple[str, Featuriser]]:
    """Functions from items to sparse rows (one per item, or per word), fitted on `train`."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.feature_extraction.text import TfidfVectorizer

    if train.task == "tagging":
        hasher = FeatureHasher(TAG_FEATURES, input_type="string", alternate_sign=False)

        def hashed(items: list[Any]) -> "sparse.csr_matrix":
            return hasher.transform(itertools.chain.from_iterable(map(word_features, items)))

        # A feature that no training word has would keep the weight 0.
        seen = np.unique(hashed(train.items).indices)
        yield "word features", lambda items: hashed(items)[:, seen]
        return
    pairs = isinstance(train.items[0], tuple)
    texts = list(itertools.chain(*train.items)) if pairs else train.items
    size = sum(map(len, texts))
    spaced = sum(map(str.isspace, itertools.chain(*texts))) > SPACED * size
    limit = min(MAX_FEATURES, MAX_WEIGHTS // max(1, len(train.names)))
    common: dict[str, Any] = {"sublinear_tf": True, "max_features": limit}
    if spaced:
        words = TfidfVectorizer(token_pattern=WORD, ngram_range=(1, 2), **common)
        yield "TF-IDF of words", _tfidf(words, texts, pairs)
    if not spaced or size <= MAX_CHARACTERS:
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **common)
        yield "TF-IDF of characters", _tfidf(characters, texts, pairs)


def _tfidf(vectorizer: "TfidfVectorizer", texts: list[str], pairs: bool) -> Featuriser:
    vectorizer.fit(texts)
    if not pairs:
        return vectorizer.transform
    from scipy import sparse

    def features(items: list[Any]) -> "sparse.csr_matrix":
        a, b = (vectorizer.transform(side) for side in zip(*items, strict=True))
        product = a.multiply(b).tocsr()
        cosine = sparse.csr_matrix(product.sum(axis=1))
        return sparse.hstack([a, b, abs(a - b), product, cosine], format="csr")

    return features


def _frequent_tag(train: Labelled) -> Predict:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for words, tags in zip(train.items, train.labels, strict=True):
        for word, tag in zip(words, tags, strict=True):
            counts[word][tag] += 1
    of_word = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    commonest = Counter(_flat_labels(train)).most_common(1)[0][0]
    return lambda items: [[of_word.get(word, commonest) for word in words] for words in items]


def word_features(words: Sequence[str]) -> list[list[str]]:
    """What the linear tagger sees of each word of a sentence.

    The word, in lower case too, its beginnings and ends up to four letters, its shape, the two
    words on either side, and whether it is the first.

    >>> word_features(["The", "cat-2"])[1][:4]
    ['word=cat-2', 'lower=cat-2', 'shape=x-0', 'prefix=c']
    """
    lower = [word.lower() for word in words]
    around = ["<<", "<", *lower, ">", ">>"]
    out = []
    for place, word in enumerate(words):
        found = [f"word={word}", f"lower={lower[place]}", f"shape={_shape(word)}"]
        for length in range(1, min(4, len(word)) + 1):
            found += [f"prefix={lower[place][:length]}", f"suffix={lower[place][-length:]}"]
        for offset in (-2, -1, 1, 2):
            found.append(f"{offset}={around[place + 2 + offset]}")
        out.append(found + ["first"] * (place == 0))
    return out


def _shape(word: str) -> str:
    """Upper case, lower case, digits and the rest as X x 0 and themselves, runs shortened."""
    kinds = (
        "X" if c.isupper() else "x" if c.isalpha() else "0" if c.isdigit() else c for c in word
    )
    return "".join(kind for kind, _ in itertools.groupby(kinds))
