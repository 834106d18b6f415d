"""Training steps on one GPU in bfloat16: speed, utilisation and memory, against transformers.

    python -m benchmarks.gpu --record gpu
    python -m benchmarks.gpu --tiny        a check that it runs, on a CPU too: numbers mean nothing

Ours is measured as it is, compiled, and compiled with CUDA graphs. Each side takes one turn to warm
up, then three by turns. FLOPs are those that a step needs, the same for all sides: 6 for each
weight of a matrix and token (of the vocabulary's and most of the last layer's only where something
is predicted), 12 * layers * dim * time for attention (half of it under a causal mask).
The utilisation is their share of what a large bfloat16 matrix product reaches in the same call.
Memory is the most that the allocator held in two steps, weights and moments of that side included.
"""

import argparse
import gc
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import speech, text
from benchmarks.timing import own_adamw, peer_adamw, stepper
from selfsup import results
from selfsup.batch import AudioSpec, ImageSpec
from selfsup.methods.contrastive.simclr import Config as SimclrConfig
from selfsup.methods.contrastive.simclr import SimCLR
from selfsup.methods.contrastive.wav2vec2 import Config as Wav2Vec2Config
from selfsup.methods.contrastive.wav2vec2 import Wav2Vec2
from selfsup.models.resnet import Config as ResNetConfig
from selfsup.models.resnet import ResNetEncoder
from selfsup.models.transformer import TransformerEncoder

Step = Callable[[], None]
Score = dict[str, Any]
Way = Callable[..., Any]
WAYS: dict[str, Way] = {
    "selfsup": lambda loss: loss,
    "compiled": torch.compile,  # as training.compile does
    "graphs": partial(torch.compile, mode="reduce-overhead"),  # replayed CUDA graphs
}
"""How our loss is computed; the ratio to the peer is that of the first."""


class Bench:
    """The machine, and how much is done on it."""

    def __init__(self, tiny: bool):
        self.tiny = tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16
        self.times = 1 if tiny else 20  # steps of a turn
        self.ceiling = self.matrix_product(256 if tiny else 8192)

    def matrix_product(self, size: int) -> float:
        """FLOPs per second of a square product in bfloat16."""
        a = torch.randn(size, size, device=self.device, dtype=self.dtype)
        return 2 * size**3 / min(self.seconds(lambda: a @ a) for _ in range(4))

    def seconds(self, step: Callable[[], Any]) -> float:
        """Of one step, in a turn of several."""
        self._wait()
        started = time.perf_counter()
        for _ in range(self.times):
            step()
        self._wait()
        return (time.perf_counter() - started) / self.times

    def compare(
        self, builders: dict[str, Callable[[], Step]], amount: float, unit: str, flops: float = 0
    ) -> Score:
        """Amounts per second of the sides, utilisation and memory."""
        score: Score = {"unit": f"{unit}/s, bfloat16"}
        steps = {}
        for side, build in builders.items():
            before = self._allocated()
            steps[side] = build()
            try:
                for _ in range(3):
                    steps[side]()
            except RuntimeError as error:  # of the compiler: that side is left out, by its name
                score[f"{side}_failed"] = str(error).strip().splitlines()[0][:200]
                del steps[side]
                continue
            if self.device.type == "cuda":
                score[f"{side}_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        turns = [{side: self.seconds(step) for side, step in steps.items()} for _ in range(4)][1:]
        for side in steps:
            best = min(turn[side] for turn in turns)
            score[side] = amount / best
            if flops:
                score[f"{side}_utilisation"] = flops / best / self.ceiling
        if "peer" in score:
            score["ratio"] = score["selfsup"] / score["peer"]
        return score

    def _allocated(self) -> int:
        """Bytes held now; the largest is counted anew from here."""
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def sides(ours: Callable[[Way], Step]) -> dict[str, Callable[[], Step]]:
    """Our step in each of `WAYS`."""
    return {name: partial(ours, way) for name, way in WAYS.items()}


def needed_flops(
    dim: int, layers: int, tokens: int, time_: int, vocabulary: int, predicted: float, seen: float
) -> float:
    """Of one training step.

    Args:
        dim, layers, vocabulary: the shape.
        tokens: of a batch.
        time_: of a row.
        predicted: share of the tokens whose logits are needed.
        seen: share of a row that a token sees on average.
    """
    whole = layers - 1  # of the last one most is needed only where something is predicted
    blocks = dim**2 * (12 * whole + 2 + 10 * predicted)
    attention = 12 * dim * time_ * seen * (whole + predicted)
    return tokens * (6 * blocks + attention + 6 * predicted * dim * vocabulary)


def masked(bench: Bench, time_: int) -> Score:
    """BERT-base MLM on rows that hold two documents each; the peer reads across."""
    dim, layers, batch, vocabulary = (64, 1, 2, 500) if bench.tiny else (768, 12, 0, 30522)
    batch = batch or 32768 // time_
    tokens = text.draw(batch, time_, vocabulary).to(bench.device)
    documents = (torch.arange(time_, device=bench.device) >= time_ // 2).long().expand(batch, -1)

    def ours(way: Way) -> Step:
        method = text.own_masked(dim, layers, vocabulary).to(bench.device)
        generator = torch.Generator(bench.device).manual_seed(0)
        given, loss = {"tokens": tokens, "documents": documents}, way(method.loss)
        return stepper(method, own_adamw(method), lambda: loss(given, generator).loss, bench.dtype)

    def peer() -> Step:
        model = text.peer_masked(dim, layers, vocabulary).to(bench.device)
        return text.peer_masked_step(model, tokens, bench.dtype)

    flops = needed_flops(dim, layers, tokens.numel(), time_, vocabulary, 0.15, 1.0)
    return bench.compare(sides(ours) | {"peer": peer}, tokens.numel(), "tokens", flops)


def causal(bench: Bench) -> Score:
    """GPT 12 x 768, rows of 1,024 tokens."""
    dim, layers, batch, time_, vocabulary = (
        (64, 1, 2, 16, 500) if bench.tiny else (768, 12, 16, 1024, 50257)
    )
    tokens = text.draw(batch, time_, vocabulary).to(bench.device)

    def side(number: int) -> Step:
        model = text.causal_models(dim, layers, vocabulary, longest=time_)[number].to(bench.device)
        return text.causal_step(model, tokens, bench.dtype)

    flops = needed_flops(dim, layers, tokens.numel(), time_, vocabulary, 1.0, 0.5)
    builders = {"selfsup": lambda: side(0), "peer": lambda: side(1)}
    return bench.compare(builders, tokens.numel(), "tokens", flops)


def simclr(bench: Bench) -> Score:
    """SimCLR with ResNet-18 on pictures of 32 pixels, views drawn on the device; no peer."""
    batch, half = (4 if bench.tiny else 1024), (0.5, 0.5, 0.5)
    spec = ImageSpec(size=32, channels=3, mean=half, std=half)
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (batch, 3, 32, 32)
    image = torch.randint(256, shape, generator=generator, device=bench.device, dtype=torch.uint8)

    def ours(way: Way) -> Step:
        encoder = ResNetEncoder(ResNetConfig(stem="cifar"), spec)
        method = SimCLR(SimclrConfig(), encoder, spec).to(bench.device)
        given, loss = {"image": image}, way(method.loss)
        return stepper(method, own_adamw(method), lambda: loss(given, generator).loss, bench.dtype)

    return bench.compare(sides(ours), batch, "pictures")


def wav2vec2(bench: Bench) -> Score:
    """wav2vec 2.0 base, rows of ten seconds."""
    batch, seconds = (2, 2) if bench.tiny else (8, 10)
    model = replace(speech.MODEL, dim=768, layers=12, heads=12, conv_channels=512)
    model = replace(speech.MODEL, dim=64, layers=1, heads=1) if bench.tiny else model
    spec, config = AudioSpec(rate=speech.RATE, mel=0, hop=320), Wav2Vec2Config()
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = batch, seconds * speech.RATE
    waveform = torch.randn(shape, generator=generator, device=bench.device)

    def ours(way: Way) -> Step:
        method = Wav2Vec2(config, TransformerEncoder(model, spec), spec).to(bench.device).train()
        given, loss = {"waveform": waveform}, way(method.loss)
        return stepper(method, own_adamw(method), lambda: loss(given, generator).loss, bench.dtype)

    def peer() -> Step:
        found = speech.transformers_model(config, model).to(bench.device).train()
        return stepper(
            *(found, peer_adamw(found)),
            lambda: speech.transformers_loss(found, config, waveform),
            bench.dtype,
        )

    builders = sides(ours) | {"peer": peer}
    return bench.compare(builders, batch * seconds, "seconds of sound")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--tiny", action="store_true", help="only check that it runs; CPU allowed")
    parser.add_argument("--record", metavar="NAME", help="write docs/results/bench-NAME.json")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --tiny checks on a CPU that this runs")
    started, bench = time.monotonic(), Bench(options.tiny)
    print(f"matrix product: {bench.ceiling / 1e12:.1f} TFLOP/s in bfloat16")
    scores = {}
    for name, measure in {
        "mlm_12x768, rows of 128": lambda: masked(bench, 128),
        "mlm_12x768, rows of 512": lambda: masked(bench, 512),
        "gpt_12x768": lambda: causal(bench),
        "simclr_resnet18": lambda: simclr(bench),
        "wav2vec2_12x768": lambda: wav2vec2(bench),
    }.items():
        scores[name] = measure()
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in scores[name].items()]
        print(f"{name}: {', '.join(shown)}", flush=True)
    if options.record:
        command = shlex.join(["python", "-m", "benchmarks.gpu", "--record", options.record])
        results.record(
            f"bench-{options.record}",
            command=command,
            seeds=[0],
            seconds=time.monotonic() - started,
            scores=scores,
            matrix_product=bench.ceiling,
        )


if __name__ == "__main__":
    main()
