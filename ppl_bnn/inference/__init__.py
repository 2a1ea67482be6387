"""Model + guide + data -> fitted guide, resumable: the ELBO, the training loop, optimizers, checkpoints, diagnosis.

May import: prediction, data, guides, models, distributed, native, the ground.
"""
