"""Predict with an exported posterior: numpy and onnxruntime, no torch.

python -m ppl_bnn.export runs/mnist-fc/out --file digits.onnx
python examples/predict_onnx.py digits.onnx data/mnist/t10k-images-idx3-ubyte
"""

import sys

import numpy as np
import onnxruntime

CLASSES = 10


def main(model: str, images: str) -> None:
    """Print the most probable digit of the first images, its probability, and the entropy in nats."""
    pixels = np.fromfile(images, dtype=np.uint8)[16:].reshape(-1, 1, 28, 28)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    probs = session.run(["probs"], {"x": pixels.astype(np.float32) / 255})[0]
    entropy = -(probs * np.log(np.maximum(probs, 1e-30))).sum(1)
    for index in range(10):
        top = probs[index].argmax()
        print(f"image {index}: {top} with probability {probs[index, top]:.4f}, entropy {entropy[index]:.4f}")
    sure = int((entropy < 0.1 * np.log(CLASSES)).sum())
    print(f"{len(probs)} images; {sure} have an entropy below a tenth of the maximum, log({CLASSES})")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
