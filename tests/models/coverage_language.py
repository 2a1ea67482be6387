"""Rows of the table of coverage: networks of Hugging Face transformers."""

from coverage_rows import CLASSES, Pick, Row, tokens


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, num_labels=CLASSES,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    # Its output layer has the embedding's weight.
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=8, **ends))


def _of(name, build, sites, parameters, own_noise, **more):
    return Row("transformers", name, build, tokens(6, 11), sites, parameters, own_noise, needs="transformers", **more)


ROWS = [
    _of("BERT", lambda: Pick(bert(), lambda output: output.logits), 17, 4_736, 14),
    _of("BERT, its output object", bert, 17, 4_736, 14),
    _of("GPT-2, the next word", lambda: Pick(gpt2(), lambda output: output.logits[:, -1]), 10, 6_448, 0),
]
