"""The global tensors that code asks for by name; the rest is called as megatron-core names it, whatever it is."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
VALUE_HEAD = "value_head.weight"
