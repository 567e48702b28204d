"""The prompts that a draft is tried with unless others are given: chat, code, sums, lists and prose."""

from __future__ import annotations

from draftsmith.infer.text.record import Record

QUESTIONS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
    "What is 17 times 23? Show each step.",
    "Name five rivers and the seas that they flow into.",
    "Explain to a child how a bicycle stays upright.",
    "Write a short email that declines an invitation to a meeting.",
    "Translate into French: the train leaves at nine in the morning.",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "How do I make a simple tomato soup?",
    "Write an SQL query that counts orders by customer.",
    "What is the difference between a virus and a bacterium?",
    "Give me three reasons to learn a musical instrument.",
    "A shirt costs 40 dollars after a discount of 20 percent. What did it cost before?",
    "Write a haiku about the sea.",
    "What does the HTTP status code 404 mean?",
    "Describe a busy market in the early morning.",
    "How does a binary search work, and how many steps does it take?",
    "Who were the first people to climb Mount Everest, and when?",
    "Write a shell command that finds all files larger than 10 megabytes.",
    "Plan a day in a city that you have never visited.",
)


def built_in() -> list[Record]:
    return [Record(str(number), turns=[text]) for number, text in enumerate(QUESTIONS)]
