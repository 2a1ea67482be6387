"""A predictive as one ONNX file, for machines without torch; pruned weights take no space in it."""

import importlib.util
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.files import written_atomically
from ppl_bnn.guides.posterior import Posterior, check_num_draws
from ppl_bnn.inputs import Inputs
from ppl_bnn.models.likelihoods import Categorical
from ppl_bnn.prediction.door import check_prediction
from ppl_bnn.prediction.draws import normalized
from ppl_bnn.prediction.moments import moment_network, softmax_moments, standard_normals
from ppl_bnn.prediction.plain import plain
from ppl_bnn.prediction.running import Target, given_latents

METHODS = ("draws", "moments")
# torch.onnx writes 18 and newer. Protocol buffers end at 2 GiB.
OLDEST_OPSET, LARGEST_FILE = 18, 2**31 - 1
TOLERANCE = 1e-5
# A tensor with fewer non-zeros than this share is stored sparse: 12 bytes a non-zero instead of 4 a weight.
SPARSE_BELOW = 1 / 3


def export(
    path: Path,
    model: nn.Module,
    guide: Posterior,
    x: Inputs,
    *,
    method: str = "draws",
    num_samples: int = 32,
    seed: int = 0,
    each_draw: bool = False,
    norm_inputs: Tensor | None = None,
    opset: int = 20,
) -> None:
    """Write the predictive of `model` under `guide`, pruned or not, as an ONNX file; its outputs are checked on `x`.

    Args:
        model, guide: as `ppl_bnn.predict` takes them, but for a Pyro model of your own; the method moments needs class
            labels and a posterior with `loc_scale`.
        path: the file, [N, ...] `x` -> `probs` [N, C] for classes, `mean` and `std` of y, [N, ...] each, for numbers;
            pruned weights take no space in it.
        x: a few inputs [N, ...].
        method: ``draws``: the averaged softmax of S frozen draws, those `predict` makes with this seed; ``moments``:
            `moment_predictive`.
        num_samples: S.
        each_draw: one more output, each draw's `draw_probs` [S, N, C], or `draw_mean` [S, N, ...].
        norm_inputs: each draw's batch norm has its own statistics of these [K, ...], as in `predict`. For ``draws``.
        opset: ONNX operator set, at least 18.

    Raises:
        UserError: an unknown method, `norm_inputs` for moments or without batch norm, S below 1 or above the
            posterior's number of draws, a posterior or `x` that `predict` refuses, an operator set that is too old or
            too new, a file that would be above 2 GiB, a layer that cannot be exported, or the extra packages missing.
        RuntimeError: onnxruntime's answers differ from torch's by more than 1e-5.
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise UserError(f"exporting needs {', '.join(missing)}: pip install 'ppl_bnn[export]'")
    import onnx

    if not OLDEST_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise UserError(
            f"ONNX operator set {opset} is too {'old' if opset < OLDEST_OPSET else 'new'}: "
            f"{OLDEST_OPSET} to {onnx.defs.onnx_opset_version()} can be written"
        )
    if not isinstance(x, Tensor):
        raise UserError(f"export takes networks of one input tensor, got a {type(x).__name__} of inputs")
    check_num_draws(guide, num_samples if method == "draws" else 0)
    target = check_prediction(model, guide, x, seed=seed, own_model="export")
    likelihood = target.likelihood
    if method == "moments":
        if not isinstance(likelihood, Categorical):
            raise UserError(f"method moments exports class labels, not {type(likelihood).__name__}; use method draws")
        if each_draw:
            raise UserError("each_draw needs method draws: moments make no draws")
        if norm_inputs is not None:
            raise UserError("norm_inputs sets each draw's batch norm statistics, so it needs method draws, got moments")
        module: nn.Module = _Moments(moment_network(target.net, guide), x)
    else:
        module = _Draws(target, guide, num_samples, seed, each_draw, norm_inputs)
    # Of classes the file has the probabilities alone.
    outputs = list(likelihood.answers if likelihood.drawn else likelihood.answers[:1])
    outputs += [f"draw_{outputs[0]}"] if each_draw else []
    # Of a single example torch.export would make a file for single examples.
    module, x = module.cpu().eval(), (x if len(x) > 1 else torch.cat([x, x])).cpu()
    # A check of a distribution's arguments depends on their values, which a traced graph has none of.
    with torch.no_grad(), pyro.validation_enabled(False):
        program = torch.onnx.export(
            module, (x,), dynamo=True, verbose=False, input_names=["x"], output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("N")},), opset_version=opset,
        )  # fmt: skip
        expected = module(x)
    proto = program.model_proto  # type: ignore[union-attr]
    _store_sparsely(proto)
    _forget_source(proto)
    with written_atomically(path) as temporary:
        onnx.save(proto, temporary)
        _check(temporary, x, expected if isinstance(expected, tuple) else (expected,))


class _Moments(nn.Module):
    points: Tensor

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("points", standard_normals(network(x[:1])[0].shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.network(x)
        return softmax_moments(mean, variance, self.points)[0]


class _Draws(nn.Module):
    """S copies of the plain network in one graph, each with its draw of the weights, and maybe its batch norm."""

    def __init__(
        self, target: Target, guide: Posterior, num_samples: int, seed: int, each_draw: bool,
        norm_inputs: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_samples < 1:
            raise UserError(f"num_samples must be at least 1, got {num_samples}")
        network = plain(target.net) if norm_inputs is None else normalized(target.net, norm_inputs)
        self.net, self.each_draw, self.likelihood = network.net, each_draw, target.likelihood
        self.draws: list[dict[str, str]] = []
        self.latents: list[dict[str, str]] = []
        size = 4 * num_samples * sum(network.parameter(site).numel() for site in guide.sites)
        if size > LARGEST_FILE:
            raise UserError(
                f"{num_samples} draws of this network are {size / 2**30:.1f} GiB and an ONNX file holds 2: "
                "take fewer draws, or the moments"
            )
        for index in range(num_samples):
            draw = guide.draw(index, seed=seed)
            own = {site: network.fold(site, draw[site]) for site in guide.sites}
            if network.normalize:
                network.net.load_state_dict(own, strict=False)
                network.normalize(seed, index, 1.0)
                own |= {name: value.clone() for name, value in network.net.named_buffers()}
            names = {name: f"draw{index}_{name.replace('.', '_')}" for name in own}
            for name, value in own.items():
                self.register_buffer(names[name], value)
            self.draws.append(names)
            latents = given_latents(self.likelihood, draw) if target.latents else {}
            self.latents.append({name: f"draw{index}_latent_{name}" for name in latents})
            for name, value in latents.items():
                self.register_buffer(f"draw{index}_latent_{name}", value)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `outputs` names: of each draw's parts, averaged."""
        parts = []
        for names, latents in zip(self.draws, self.latents, strict=True):
            weights = {site: getattr(self, name) for site, name in names.items()}
            outputs = torch.func.functional_call(self.net, weights, (x,))
            parts.append(self.likelihood.parts(outputs, **{name: getattr(self, at) for name, at in latents.items()}))
        means = torch.stack([own["mean"] for own in parts])
        averages = {name: torch.stack([own[name] for own in parts]).mean(0) for name in parts[0]}
        found: tuple[Tensor, ...] = (averages["mean"],)
        if self.likelihood.drawn:
            averages["spread"] = (means - averages["mean"]).square().mean(0)
            found = self.likelihood.answer(averages)
        return (*found, means) if self.each_draw else found


def _store_sparsely(model: Any) -> None:
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    for position in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[position]
        values = numpy_helper.to_array(tensor)
        # A sparse tensor has at least one value.
        at = values.ravel().nonzero()[0] if values.any() else np.zeros(1, dtype=np.int64)
        if values.dtype == np.float32 and values.ndim >= 2 and len(at) < SPARSE_BELOW * values.size:
            name, index = tensor.name, at.astype(np.int64)
            sparse = helper.make_sparse_tensor(
                numpy_helper.from_array(values.ravel()[at], name),
                numpy_helper.from_array(index, f"{name}_index"),
                list(values.shape),
            )
            del graph.initializer[position]
            graph.sparse_initializer.append(sparse)


def _forget_source(model: Any) -> None:
    # torch writes the stack trace of each operation into it, with this machine's paths.
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]


def _check(path: Path, x: Tensor, expected: tuple[Tensor, ...]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for found, right in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        # Probabilities are at most 1; of larger numbers the digits count.
        difference = float((torch.from_numpy(found) - right).abs().max() / right.abs().max().clamp_min(1))
        if not difference <= TOLERANCE:
            raise RuntimeError(f"onnxruntime's answers differ from torch's by {difference:.1e}; nothing was written")
