"""Mixtures of experts: all experts of a layer in the launches that one linear would take. Start reading at ops.py."""
