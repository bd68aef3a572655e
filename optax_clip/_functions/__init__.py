"""Defines functions of trees and of examples: they are not transformations."""
