"""Durable batch runs."""
