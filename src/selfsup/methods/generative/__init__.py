"""Generative methods: predict the missing part of the input itself."""
