"""Encoded bytes to views: decoding, crops and colours."""
