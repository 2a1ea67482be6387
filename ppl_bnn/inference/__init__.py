"""Model + guide + data -> fitted guide, resumable: the ELBO, the training loop, optimizers, checkpoints, diagnosis.

May import: guides, models, data, distributed, native, errors, files, safe_tensors.
"""
