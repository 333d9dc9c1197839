"""Milvus: the confirmed cases, their embeddings and facts."""
