"""The gRPC face: conversion, status mapping, servicers, composition. Imports no torch."""
