"""EK-FAC influence and SOURCE by bergson 2.5.1 for a trained causal language model, called by the study.

It runs in an environment of its own:

    pip install torch==2.13.0 bergson==2.5.1
    pip uninstall --yes torchvision torchaudio
    python benchmarks/lds_study.py --task wikitext --bergson path/to/that/python ...

Reads ``network.*``, ``train.0`` and ``query.0`` (token blocks of equal length) and, for SOURCE, ``checkpoint.K.*`` and
``square.K.*`` (parameters and Adam's bias-corrected second moments of the snapshot that ends after K steps) with
``rates`` and ``steps`` of the segments; writes ``scores`` and ``seconds``. Loss and measurement are the mean of a
sequence's tokens, or their sum. Bergson follows the linear layers of the network's body, neither embeddings, norms nor
the head, and in its SOURCE for Adam no biases.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

# Before the imports: no GPU, no look at the hub, no progress bars among the study's own lines.
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import numpy as np
import torch
from bergson.cli.commands import ApproxUnrolling, Ekfac
from bergson.config import (
    ApproxUnrollingConfig,
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


def save_model(folder: Path, config: GPT2Config, weights: dict[str, Tensor]) -> GPT2LMHeadModel:
    """A model that bergson can load; the blocks are numbers already, so the tokenizer has nothing to do."""
    model = GPT2LMHeadModel(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:  # the head is the embedding
        raise ValueError(f"not the network of this configuration: {missing} are missing, {unexpected} unknown")
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0").save_pretrained(folder)
    return model


def save_moments(folder: Path, model: GPT2LMHeadModel, squares: dict[str, Tensor], step: int) -> None:
    """What PyTorch's AdamW would save: bergson reads the second moments from there."""
    optimizer = torch.optim.AdamW(model.parameters())
    beta = optimizer.defaults["betas"][1]
    names = [name for name, _ in model.named_parameters()]
    moments = {i: {"step": step, "exp_avg_sq": squares[n] * (1 - beta**step)} for i, n in enumerate(names)}
    torch.save({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}, folder / "optimizer.pt")


def main(given: str, found: str, method: str, reduction: str, config: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = load_file(given)
    configuration = GPT2Config(**json.loads(config))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sets = {}
        for part in ("train", "query"):
            Dataset.from_dict({"input_ids": tensors[f"{part}.0"].tolist()}).save_to_disk(folder / part)
            sets[part] = str(folder / part)
        save_model(folder / "final", configuration, under("network", tensors))
        steps = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("checkpoint.")})
        for step in steps:
            place = folder / f"checkpoint-{step}"
            model = save_model(place, configuration, under(f"checkpoint.{step}", tensors))
            save_moments(place, model, under(f"square.{step}", tensors), step)

        index = IndexConfig(
            run_path=str(folder / "run"),
            model=str(folder / "final"),
            data=DataConfig(dataset=sets["train"]),
            include_bias=method == "ekfac",  # its Adam preconditioner takes weights alone
            loss_reduction=reduction,
            token_batch_size=np.iinfo(np.int64).max,  # all at once; any less must fit one sequence
        )
        hessian = HessianConfig(method="kfac", ev_correction=True)  # labels sampled from the model
        query = QuerySetConfig(dataset=sets["query"], aggregation="none")
        start = time.perf_counter()
        if method == "ekfac":
            pipeline = HessianPipelineConfig(query=query)  # damped by 0.1 times the mean eigenvalue
            Ekfac(index, hessian, ScoreConfig(), PreprocessConfig(), pipeline).execute()
        else:
            unrolling = ApproxUnrollingConfig(
                checkpoints=[str(folder / f"checkpoint-{step}") for step in steps],
                segments=len(tensors["rates"]),
                lr_list=tensors["rates"].tolist(),
                step_size_list=tensors["steps"].tolist(),
                momentum=0.0,
                use_adam_preconditioner=True,
                query=query,
            )
            ApproxUnrolling(index, hessian, unrolling).execute()
        scores = torch.tensor(np.array(load_scores(folder / "run" / "scores")[:])).T
        seconds = torch.tensor(time.perf_counter() - start)
    # Its SOURCE is negative where an example helps.
    sign = 1 if method == "ekfac" else -1
    save_file({"scores": (sign * scores / scores.shape[1]).float().contiguous(), "seconds": seconds}, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
