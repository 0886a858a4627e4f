"""A CLIP of a few weights in a directory, as transformers writes them; its words are letters."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def write(folder: Path, width: int = 6) -> Path:
    """Writes the model and its tokenizer, and returns the folder."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    layers = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "eos_token_id": 2,
            "bos_token_id": 1, "pad_token_id": 0, "num_attention_heads": 2}  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**layers, **text}, vision_config={**layers, **vision}, projection_dim=width
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():  # as initialised, all pictures are nearly alike
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder
