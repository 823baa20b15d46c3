"""A GGUF file of a tiny Llama, begun for a test."""

import pathlib

import gguf


def open_llama(path: pathlib.Path) -> gguf.GGUFWriter:
    """Begins a GGUF file whose metadata are those of a tiny Llama; the caller adds the rest."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, size in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 32,
        "head_count": 2,
        "head_count_kv": 2,
    }.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes the header, the metadata and the tensors, and closes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
