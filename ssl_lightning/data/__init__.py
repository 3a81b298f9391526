"""Data modules and views."""
