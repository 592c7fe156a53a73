"""Hugging Face's layout of whole weights."""
