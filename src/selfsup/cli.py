"""The command line: every verb teaches by example, answers at once, and ends with the next step."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from selfsup import distill_verb, merge_verb, pet_verb, plan_verb, prep_verbs, prune_verb, verbs
from selfsup.errors import SelfsupError

EPILOG = """\
a first run:
  selfsup list recipes
  selfsup pretrain bert-tiny-english --data texts/ --out runs/mine
  selfsup compare runs/mine --task classification --data reviews.csv
  selfsup report runs/mine

exit codes: 0 done, 2 wrong use, 3 bad data, 4 diverged, 5 storage, 130/143 stopped and resumable
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with one line of error, a pointer to the help, and our exit code."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}\nsee: {self.prog} --help\n")


def _verb(
    parsers: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str
) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _set_option(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help=f"change the configuration: {example}",
    )


def _column_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("columns, where they do not have their usual names")
    group.add_argument("--text", metavar="COLUMN", help="the text, picture or path")
    group.add_argument("--text-b", metavar="COLUMN", help="the second text of a pair")
    group.add_argument("--label", metavar="COLUMN", help="the label; for CoNLL-U also xpos, deprel")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="selfsup",
        description="Pre-train on your own unlabeled data, adapt with few labels, "
        "and see with evidence what the pre-training was worth.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    _add_training_verbs(parsers)
    _add_using_verbs(parsers)
    _add_prompt(parsers)
    _add_looking_verbs(parsers)
    _add_distill_verb(parsers)
    _add_few_label_verbs(parsers)
    _add_prune_verb(parsers)
    _add_merge_verb(parsers)
    _add_plan_verb(parsers)
    _add_study_verb(parsers)
    _add_preparing_verbs(parsers)
    _add_interop_verbs(parsers)
    return parser


def _add_training_verbs(parsers: Any) -> None:
    p = _verb(
        parsers,
        "pretrain",
        verbs.pretrain,
        "learn from unlabeled data",
        "  selfsup pretrain bert-tiny-english --data texts/ --out runs/mine\n"
        "  selfsup pretrain my.toml --data 'logs/*.jsonl.gz' --out runs/logs \\\n"
        "      --set training.minutes=30 method.mask_rate=0.3\n"
        "  selfsup pretrain bert-tiny-english --data texts/ --out runs/mine --resume\n"
        "  selfsup pretrain bert-mini-multilingual --data en=novels/ zh=histories/ --out runs/two",
    )
    p.add_argument("recipe", help="a named recipe (selfsup list recipes) or a TOML file")
    p.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="files, folders, globs, or hf:NAME; NAME=PATH,PATH for each of several languages",
    )
    p.add_argument("--out", required=True, help="the run folder to make")
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    _set_option(p, "training.steps=2000 model.layers=4")

    p = _verb(
        parsers,
        "finetune",
        verbs.finetune,
        "adapt a pre-trained run to a task with labels",
        "  selfsup finetune runs/mine --task classification --data reviews.csv --out runs/reviews\n"
        "  selfsup finetune runs/mine --task tagging --data train.conllu --valid dev.conllu \\\n"
        "      --tuning probe --out runs/tags --set training.lr=1e-3\n"
        "  selfsup finetune runs/bart --task generation --data train.en.gz:train.de.gz \\\n"
        "      --out runs/en-de --set task.num_beams=4",
    )
    p.add_argument("model", help="a pre-trained run folder")
    p.add_argument(
        "--task", required=True, help="classification, tagging, regression, span_qa, generation"
    )
    p.add_argument(
        "--data",
        required=True,
        help="labelled file: csv, tsv, jsonl, conllu, SQuAD json; lines of text: SOURCES:TARGETS",
    )
    p.add_argument("--valid", help="labelled file that is followed while training")
    p.add_argument("--out", required=True, help="the run folder to make")
    p.add_argument(
        "--tuning",
        default="full",
        help="which parameters move (selfsup list tunings); + joins several",
    )
    p.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    _set_option(p, "training.steps=500 training.lr=1e-3 task.dropout=0.0")
    _column_options(p)

    p = _verb(
        parsers,
        "compare",
        verbs.compare,
        "measure what pre-training was worth: against scratch and a classical baseline",
        "  selfsup compare runs/mine --task classification --data reviews.csv\n"
        "  selfsup compare runs/mine --task tagging --data train.conllu --valid dev.conllu \\\n"
        "      --test test.conllu --labels 50 300 2000 --seeds 0 1 2 3 4\n"
        "  selfsup compare runs/mine --task classification --data reviews.csv \\\n"
        "      --tuning full,lora,lora+bias,probe --set tuning.lora.rank=16",
    )
    p.add_argument("model", help="a pre-trained run folder")
    p.add_argument(
        "--task", required=True, help="classification, tagging, regression, span_qa, generation"
    )
    p.add_argument("--data", required=True, help="labelled file that subsets are drawn from")
    p.add_argument("--valid", help="labelled file that chooses learning rates (default: split off)")
    p.add_argument("--test", help="labelled file that is scored (default: split off)")
    p.add_argument("--labels", nargs="+", type=int, metavar="N", help="numbers of labels")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    p.add_argument("--lrs", nargs="+", type=float, help="learning rates that are tried (by tuning)")
    p.add_argument("--steps", type=int, help="steps per training (default: by number of labels)")
    p.add_argument(
        "--tuning",
        default="full",
        help="names (selfsup list tunings), + for together, commas for one after the other (full)",
    )
    p.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")
    p.add_argument(
        "--jobs", type=int, default=0, help="trainings side by side (0: one per core, at most 8)"
    )
    p.add_argument("--out", help="another place for compare.json")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    _set_option(p, "tuning.lora.rank=16")
    _column_options(p)

    p = _verb(
        parsers,
        "probe",
        verbs.probe,
        "see what frozen features are worth: kNN and linear probe, beside an untrained network",
        "  selfsup probe runs/photos --data train.parquet --test test.parquet\n"
        "  selfsup probe runs/speech --data wavs/ --across-groups \\\n"
        "      --label '(?P<label>\\d)_(?P<group>[a-z]+)_'\n"
        "  selfsup probe runs/load --task forecasting --data load.csv --horizon 24",
    )
    p.add_argument("model", help="a pre-trained run folder")
    p.add_argument(
        "--task", default="classification", help="classification (default), regression, forecasting"
    )
    p.add_argument("--data", required=True, help="labelled file or folder that fits the probes")
    p.add_argument("--valid", help="labelled data that choose their settings (default: split off)")
    p.add_argument("--test", help="labelled data that are scored once (default: split off)")
    p.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")
    p.add_argument(
        "--across-groups", action="store_true", help="leave out one group (a speaker) at a time"
    )
    p.add_argument("--folds", type=int, default=0, help="parts of the groups (one for each group)")
    p.add_argument("--shots", type=int, default=1, help="labels per class and group, for `few` (1)")
    p.add_argument("--horizon", type=int, default=0, help="rows to forecast (96)")
    p.add_argument(
        "--splits",
        default="",
        metavar="ett|SHARES|ROWS",
        help="rows to fit, to choose and to score forecasts: 0.7,0.1,0.2 (default: the run's)",
    )
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    _column_options(p)

    p = _verb(
        parsers,
        "align",
        verbs.align,
        "see whether translations lie close to each other, layer by layer",
        "  selfsup align runs/two --data pairs.tsv\n"
        "  selfsup align runs/two --data words.jsonl --text en --text-b zh",
    )
    p.add_argument("model", help="a pre-trained run of several languages")
    p.add_argument("--data", required=True, help="pairs: csv, tsv, jsonl, parquet")
    p.add_argument("--text", metavar="COLUMN", help="one language (default: the first of two)")
    p.add_argument("--text-b", metavar="COLUMN", help="the other one (the second of two)")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")

    p = _verb(
        parsers,
        "evaluate",
        verbs.evaluate,
        "score a run on data it was not trained on",
        "  selfsup evaluate runs/mine                       held-out loss of its own corpus\n"
        "  selfsup evaluate runs/mine --data other.txt\n"
        "  selfsup evaluate runs/reviews --data test.csv    metrics of a fine-tuned run\n"
        "  selfsup evaluate runs/mine --suite glue --data glue/ --labels 200\n"
        "      fine-tunes and scores every task of a suite (selfsup list suites, or a TOML file)\n"
        "  selfsup evaluate runs/rows --data test.csv --label class --normal ok\n"
        "      anomalies that a pre-trained autoencoder finds, beside other detectors",
    )
    p.add_argument("model", help="a run folder")
    p.add_argument(
        "--data",
        help="unlabeled text, for a fine-tuned run a labelled file, for a suite its folder",
    )
    p.add_argument(
        "--normal", metavar="VALUE", help="the label of normal rows, all others being anomalies"
    )
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    p.add_argument(
        "--exits",
        metavar="VALID",
        help="score and speed of early exits, whose thresholds are chosen on this labelled file",
    )
    _set_option(p, "task.exits.rule=patience task.exits.patience=2 task.num_beams=4")
    _column_options(p)
    group = p.add_argument_group("a suite of tasks")
    group.add_argument("--suite", metavar="NAME|FILE", help="a suite (selfsup list suites) or TOML")
    group.add_argument("--labels", type=int, metavar="N", help="training examples a task (all)")
    group.add_argument("--seeds", nargs="+", type=int, help="seeds (0)")
    group.add_argument("--lrs", nargs="+", type=float, help="learning rates to choose from")
    group.add_argument(
        "--steps", type=int, help="steps per training (default: by number of labels)"
    )
    group.add_argument("--tuning", help="full (default), or a name of selfsup list tunings")
    group.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")
    group.add_argument("--out", help="folder of results (suite-NAME in the run folder)")


def _add_using_verbs(parsers: Any) -> None:
    p = _verb(
        parsers,
        "embed",
        verbs.embed,
        "turn texts, pictures, sounds or rows into vectors",
        "  selfsup embed runs/mine --data lines.txt --out vectors.npy\n"
        "  selfsup embed runs/photos --data new/ --out vectors.npy",
    )
    p.add_argument("model", help="a run folder")
    p.add_argument(
        "--data", required=True, nargs="+", help="files of the kind that the run was trained on"
    )
    p.add_argument("--text", metavar="COLUMN", help="column of csv, jsonl, parquet (text, image)")
    p.add_argument("--out", required=True, help="a .npy file: (items, dim) float32")
    p.add_argument("--batch-size", type=int, default=64, help="items per forward pass (64)")

    p = _verb(
        parsers,
        "fill",
        verbs.fill,
        "fill the blanks of a text",
        "  selfsup fill runs/mine 'He closed the [MASK] and went home.'",
    )
    p.add_argument("model", help="a masked_language run")
    p.add_argument("text", help="a text with one or more [MASK]")
    p.add_argument("--top", type=int, default=5, help="candidates per blank (5)")

    p = _verb(
        parsers,
        "generate",
        verbs.generate,
        "write on from a beginning",
        "  selfsup generate runs/gpt --prompt 'It was a dark' --tokens 80 --temperature 0.8",
    )
    p.add_argument("model", help="a causal_language run")
    p.add_argument("--prompt", default="", help="the beginning")
    p.add_argument("--tokens", type=int, default=100, help="most tokens to add (100)")
    p.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token (1.0)")
    p.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: all")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from this share of probability")
    p.add_argument("--seed", type=int, default=0, help="another seed, another text")

    p = _verb(
        parsers,
        "predict",
        verbs.predict,
        "label new items with a fine-tuned run, or find unusual ones with an autoencoder",
        "  selfsup predict runs/reviews 'A wonderful film.'\n"
        "  selfsup predict runs/reviews --data new.csv > labels.tsv\n"
        "  selfsup predict runs/pairs --data new.csv --text question --text-b answer\n"
        "  selfsup predict runs/rows --data new.csv         anomaly or normal, and why",
    )
    p.add_argument("model", help="a fine-tuned run, or an autoencoder of rows or pictures")
    p.add_argument("items", nargs="*", help="texts, or paths of pictures or sounds")
    p.add_argument("--data", nargs="+", help="files of the kind that the run was trained on")
    p.add_argument("--text", metavar="COLUMN", help="column of csv, jsonl, parquet (text, image)")
    p.add_argument("--text-b", metavar="COLUMN", help="the second text, for a model of pairs")
    _set_option(p, "task.exits.rule=patience task.exits.patience=2 task.num_beams=4")


def _add_prompt(parsers: Any) -> None:
    p = _verb(
        parsers,
        "prompt",
        verbs.prompt,
        "let a causal language model label items after a few examples in its prompt",
        "  selfsup prompt runs/gpt 'a wonderful film' --template sentiment\n"
        "  selfsup prompt runs/gpt --template sentiment --data train.csv --test test.csv \\\n"
        "      --shots 0 1 4 16 --seeds 0 1 2 --calibrate\n"
        "  selfsup prompt runs/gpt 'Two men sleep. | The men are awake.' --template nli",
    )
    p.add_argument("model", help="a causal_language run")
    p.add_argument("items", nargs="*", help="texts, or 'one | other' for a template of pairs")
    p.add_argument("--template", required=True, help="a name (selfsup list templates) or a file")
    p.add_argument("--data", help="labelled file that demonstrations are drawn from")
    p.add_argument("--test", help="labelled file that is scored (default: split off --data)")
    p.add_argument(
        "--shots", nargs="+", type=int, metavar="N", help="demonstrations (0 1 4 16; items: 4)"
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    p.add_argument("--balanced", action="store_true", help="draw equally many of each class")
    p.add_argument("--calibrate", action="store_true", help="contextual calibration")
    p.add_argument(
        "--normalise", default="none", help="score of a label word: none, length, unconditional"
    )
    p.add_argument("--limit", type=int, metavar="N", help="score so many test items only")
    p.add_argument("--max-length", type=int, help="longest prompt in tokens")
    p.add_argument("--reasoning-tokens", type=int, default=64, help="longest reasoning (64)")
    p.add_argument("--temperature", type=float, default=0.0, help="of reasoning; 0: no chance (0)")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    _column_options(p)


def _add_looking_verbs(parsers: Any) -> None:
    p = _verb(
        parsers,
        "report",
        verbs.report,
        "write one HTML page about a run or several",
        "  selfsup report runs/mine\n  selfsup report runs/* --out comparison.html",
    )
    p.add_argument("models", nargs="+", help="run folders")
    p.add_argument("--out", help="the file (default: report.html in the first run)")
    p.add_argument("--figure", metavar="PNG", help="also draw the first run's comparison")

    p = _verb(
        parsers,
        "list",
        verbs.list_,
        "show what there is",
        "  selfsup list recipes\n  selfsup list methods",
    )
    p.add_argument(
        "what", nargs="?", help="recipes, methods, models, tasks, tunings, data, templates"
    )

    p = _verb(
        parsers,
        "doctor",
        verbs.doctor,
        "check the installation, a data folder or a run",
        "  selfsup doctor\n  selfsup doctor photos/\n  selfsup doctor load.csv --kind series\n"
        "  selfsup doctor runs/mine",
    )
    p.add_argument("path", nargs="?", help="data or a run folder")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")
    p.add_argument("--kind", help="text, image, audio, table or series (default: guessed)")


def _add_preparing_verbs(parsers: Any) -> None:
    p = _verb(
        parsers,
        "prep",
        prep_verbs.clean,  # each verb below sets its own
        "clean a corpus, or look for a test set in it",
        "  selfsup prep clean --data crawl/ --out clean/\n"
        "  selfsup prep contamination --data clean/documents --test test.csv --out found.json",
    )
    preparing = p.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=_Parser)
    p = _verb(
        preparing,
        "clean",
        prep_verbs.clean,
        "keep what the rules of C4 keep of texts, and each text once",
        "  selfsup prep clean --data crawl/ --out clean/\n"
        "  selfsup prep clean --data 'crawl/*.jsonl.gz' --out clean/ --language en\n"
        "  selfsup prep clean --data chat.csv --text message --out clean/ \\\n"
        "      --set min_sentences=1 min_line_words=3 bad_words=words.txt",
    )
    p.add_argument("--data", required=True, nargs="+", help="files, folders, globs, or hf:NAME")
    p.add_argument("--out", required=True, help="the folder to make")
    p.add_argument("--language", metavar="CODE", help="keep one language: en, zh, ...")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")
    p.add_argument(
        "--split",
        default="file",
        choices=["file", "line", "blank_line"],
        help="what a document is in .txt files (file)",
    )
    _set_option(p, "min_sentences=1 near_duplicates=false")
    p = _verb(
        preparing,
        "contamination",
        prep_verbs.contamination,
        "count the items of a test set that a corpus holds",
        "  selfsup prep contamination --data texts/ --test test.csv --out found.json\n"
        "  selfsup prep contamination --data texts/ --test dev.tsv --test-text sentence \\\n"
        "      --n 8 --out found.json --drop clean_dev.jsonl",
    )
    p.add_argument("--data", required=True, nargs="+", help="the corpus, as for pretrain")
    p.add_argument("--test", required=True, help="the test set; of .txt each line is an item")
    p.add_argument("--out", required=True, metavar="FILE.json", help="the counts, item by item")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")
    p.add_argument("--test-text", metavar="COLUMN", help="the same of the test set, if another")
    p.add_argument("--n", type=int, default=13, help="words of an n-gram (13)")
    p.add_argument("--drop", metavar="OUT.jsonl", help="write the items that are not contaminated")


def _add_distill_verb(parsers: Any) -> None:
    p = _verb(
        parsers,
        "distill",
        distill_verb.distill,
        "make a smaller run that answers as a fine-tuned one does",
        "  selfsup distill runs/reviews --data reviews.csv --out runs/half\n"
        "  selfsup distill runs/reviews --data reviews.csv --unlabelled texts/ --layers 2 \\\n"
        "      --out runs/small --set distillation.temperature=4 training.steps=2000\n"
        "  selfsup distill runs/tags --student runs/mini --data train.conllu --out runs/mini-tags",
    )
    p.add_argument("model", help="the teacher: a run fine-tuned for classes, tags or numbers")
    p.add_argument("--data", required=True, help="labelled file with the teacher's labels")
    p.add_argument(
        "--unlabelled", nargs="+", metavar="FILE", help="more items, for which the teacher speaks"
    )
    p.add_argument("--valid", help="labelled file that is followed while training")
    p.add_argument("--out", required=True, help="the run folder to make")
    p.add_argument(
        "--layers", type=int, help="layers of the student, taken from the teacher (half of them)"
    )
    p.add_argument("--fresh", action="store_true", help="begin with random weights instead")
    p.add_argument("--student", metavar="RUN", help="a smaller run with the same tokenizer")
    p.add_argument("--max-length", type=int, help="longest item (the teacher's)")
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    _set_option(p, "distillation.alpha=0.5 distillation.hidden_weight=1 training.lr=1e-3")
    _column_options(p)


def _add_few_label_verbs(parsers: Any) -> None:
    p = _verb(
        parsers,
        "pet",
        pet_verb.pet,
        "learn from few labels and many texts without, by templates with a blank",
        "  selfsup pet runs/mine --templates cloze-sentiment-it-was cloze-sentiment-just \\\n"
        "      --data few.tsv --unlabelled texts.txt --out runs/reviews\n"
        "  selfsup pet runs/mine --templates mine.txt other.txt --data few.tsv --zero-shot\n"
        "  selfsup pet runs/mine --templates mine.txt other.txt --data few.tsv \\\n"
        "      --unlabelled texts.txt --out runs/reviews --set pet.generations=3",
    )
    p.add_argument("model", help="a pre-trained masked_language or gpt_bert run")
    p.add_argument(
        "--templates",
        required=True,
        nargs="+",
        metavar="NAME|FILE",
        help="templates with a blank (selfsup list templates), or text files",
    )
    p.add_argument(
        "--zero-shot", action="store_true", help="score --data with each template, train nothing"
    )
    p.add_argument(
        "--search-words", action="store_true", help="search other words for the classes first"
    )
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    _few_label_options(p, required=False)
    _set_option(p, "pet.weights=uniform cloze_training.steps=100 training.lr=1e-3")
    _column_options(p)

    p = _verb(
        parsers,
        "self-train",
        pet_verb.self_train,
        "learn from few labels and many items without, which the classifier labels itself",
        "  selfsup self-train runs/mine --data few.tsv --unlabelled texts.txt --out runs/reviews\n"
        "  selfsup self-train runs/mine --data few.tsv --unlabelled texts.txt --out runs/new \\\n"
        "      --set self_training.threshold=0.95 self_training.rounds=5",
    )
    p.add_argument("model", help="a pre-trained run")
    _few_label_options(p, required=True)
    _set_option(p, "self_training.threshold=0.95 training.steps=200")
    _column_options(p)


def _few_label_options(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--data", required=True, help="labelled file: csv, tsv, jsonl, parquet")
    parser.add_argument(
        "--unlabelled", nargs="+", required=required, metavar="FILE", help="items without labels"
    )
    parser.add_argument("--valid", help="labelled file that is followed while training")
    parser.add_argument("--out", required=required, help="the run folder to make")
    parser.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")


def _add_prune_verb(parsers: Any) -> None:
    p = _verb(
        parsers,
        "prune",
        prune_verb.prune,
        "make a smaller and faster run of a run",
        "  selfsup prune runs/tags --heads 0.3 --data train.conllu --out runs/small\n"
        "  selfsup prune runs/mine --top-layers 2 --out runs/short\n"
        "  selfsup prune runs/tags --movement 0.85 --data train.conllu --out runs/sparse \\\n"
        "      --set training.steps=500",
    )
    prune_verb.add_options(p)
    _set_option(p, "training.steps=500 pruning.cooldown=0.2 (while it trains)")
    _column_options(p)


def _add_merge_verb(parsers: Any) -> None:
    p = _verb(
        parsers,
        "merge",
        merge_verb.merge_verb,
        "make a run that was tuned over a base one that needs no base",
        "  selfsup merge runs/mood-lora --out runs/mood",
    )
    merge_verb.add_options(p)


def _add_plan_verb(parsers: Any) -> None:
    p = _verb(
        parsers,
        "plan",
        plan_verb.plan,
        "count parameters, FLOPs, memory and days of a model before training it",
        "  selfsup plan gpt3-175b --devices 1024 --tensor 8 --pipeline 8 --hardware a100\n"
        "  selfsup plan bert-base --hardware rtx4090 --tokens 3e9\n"
        "  selfsup plan bert-mini-english --set model.layers=12 model.dim=768\n"
        "names: elmo bert-base bert-large gpt2-xl megatron-8b t5-11b turing-nlg-17b gpt3-175b\n"
        "       switch-1.6t, or a recipe of text",
    )
    p.add_argument("name", help="a published model, a recipe, or a .toml file")
    p.add_argument(
        "--hardware", default="h100", help="v100 a100 h100 h200 b200 rtx4090 tpu-v3 tpu-v4 (h100)"
    )
    p.add_argument("--tflops", type=float, help="another peak of one device, in 16 bits")
    p.add_argument("--gigabytes", type=float, help="another memory of one device")
    p.add_argument("--devices", type=int, default=1, help="all devices (1)")
    p.add_argument("--tensor", type=int, default=1, help="devices that share every matrix (1)")
    p.add_argument("--pipeline", type=int, default=1, help="devices in a row of layers (1)")
    p.add_argument("--experts", type=int, default=0, help="devices that share experts (all copies)")
    p.add_argument(
        "--sharding",
        default="none",
        choices=("none", "optimizer", "full"),
        help="what copies keep a share of: ZeRO 1 is optimizer, FSDP full (none)",
    )
    p.add_argument("--micro-batch", type=int, default=1, help="rows that a copy reads at once (1)")
    p.add_argument("--checkpointing", action="store_true", help="compute activations again")
    p.add_argument("--utilisation", type=float, default=0.4, help="share of the peak (0.4)")
    p.add_argument("--tokens", type=float, help="tokens of the training (default: as published)")
    p.add_argument("--json", action="store_true", help="print JSON")
    _set_option(p, "model.layers=24")


def _add_interop_verbs(parsers: Any) -> None:
    p = _verb(
        parsers,
        "import",
        verbs.import_,
        "make a run of a published checkpoint",
        "  selfsup import bert-base-uncased --out runs/bert\n"
        "  selfsup import checkpoints/t5-small --out runs/t5\n"
        "  selfsup import adapters/mood --base runs/bert --out runs/mood    an adapter of PEFT",
    )
    p.add_argument(
        "source", help="a folder of transformers (safetensors), or a name on the Hugging Face Hub"
    )
    p.add_argument("--base", metavar="RUN", help="of an adapter of PEFT: the model it is for")
    p.add_argument("--out", required=True, help="the run folder to make")

    p = _verb(
        parsers,
        "export",
        verbs.export,
        "write a run as a checkpoint of another library",
        "  selfsup export runs/mine --to transformers --out checkpoints/mine\n"
        "  selfsup export runs/mood-lora --to peft --out adapters/mood",
    )
    p.add_argument("model", help="a run folder with a transformer of text")
    p.add_argument("--to", default="transformers", help="transformers (default) or peft")
    p.add_argument("--out", required=True, help="the folder to make")


def _add_study_verb(parsers: Any) -> None:
    p = _verb(
        parsers,
        "study",
        verbs.study,
        "make a published claim again at small scale",
        "  selfsup study language_methods --out runs/methods --minutes 4",
    )
    p.add_argument("name", help="a study (selfsup list studies)")
    p.add_argument("--out", required=True, help="folder of its runs; what is there is kept")
    p.add_argument("--only", nargs="+", metavar="ARM", help="a part of the study (all)")
    p.add_argument("--minutes", type=float, default=4.0, help="of each pre-training (4)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; gives the exit code of errors.py."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        import importlib.metadata

        print(importlib.metadata.version("selfsup"))
        return 0
    if options.verb is None:
        parser.print_help()
        return 0
    try:
        options.run(options)
    except SelfsupError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `selfsup predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
