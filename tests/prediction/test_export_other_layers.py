"""ONNX files and InferenceData of networks with other layers than Linear and Conv2d."""

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from ppl_bnn import Classifier, MeanFieldNormal, UserError, bayesian, predict, to_inference_data
from ppl_bnn.prediction.onnx import export

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
SERIES = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 9, (6, 5), generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


NETWORKS = {
    "LSTM": (Recurrent, SERIES),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)), SERIES),
    "Embedding": (Words, TOKENS),
}


# torch's own, where it writes a recurrent layer down.
@pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning")
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_and_inference_data_are_those_of_predict(tmp_path, name):
    build, x = NETWORKS[name]
    torch.manual_seed(0)
    model = Classifier(bayesian(build()), len(x))
    guide = MeanFieldNormal(model, x[:1], torch.zeros(1, dtype=torch.long), init_loc=0.5)
    found = predict(model, guide, x, torch.arange(6) % 3, num_samples=4, method="draws", progress=False)
    export(tmp_path / "net.onnx", model, guide, x[:2], num_samples=4)
    session = ort.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    probs = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(probs, torch.as_tensor(found.probs).mean(0), rtol=1e-4, atol=1e-5)
    idata = to_inference_data(found, guide=guide)
    assert {f"norm_{site}" for site in guide.sites} <= set(idata["posterior"].data_vars)


def test_what_has_no_graph_is_refused_by_name(tmp_path):
    net = VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3
    )
    x = torch.rand(2, 3, 8, 8)
    model = Classifier(bayesian(net), 2)
    guide = MeanFieldNormal(model, x[:1], torch.zeros(1, dtype=torch.long))
    with pytest.raises(UserError, match="BayesianVisionTransformer has no fixed graph of layers"):
        export(tmp_path / "net.onnx", model, guide, x, num_samples=4)
    assert not (tmp_path / "net.onnx").exists()
