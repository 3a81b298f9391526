"""Tests of ssl_lightning."""
