"""Defines what is no transformation of a chain: functions of trees and of examples."""
