"""saferule"""
