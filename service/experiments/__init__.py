"""Experiments on live traffic: their state, their records, their report and their page."""
