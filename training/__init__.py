"""How the embedded FLUX.1-Kontext model is made: data, autoencoder, transformer, evaluation, export."""
